"""nn.LSTM, nn.GRU and nn.RNN in compiled models: live switches and rates, sizes, copies, errors, all variants."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import dropfx
from dropfx.draws.runtime import shared
from dropfx.testing import assert_equivalent
from tests.catalogue import CASES
from tests.catalogue.case import Draw, check_step, compiled_run, pair, recording
from tests.catalogue.recurrent import ALL, LSTM, Around, steps
from tests.oracle import comparison, oracle

Models = tuple[nn.Module, nn.Module]
PATTERNS = ("block", "slice", "row")


def example(length: int = 5, batch: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    return steps(2, 2, length=length)(batch, Draw(dtype, length * 31 + batch))


def check(models: Models, *args: Any, seed: int = 0, left_alone: tuple[str, ...] = ()) -> oracle.Masks:
    """Promise 2 for one step, and the masks of the sites that dropped anything."""
    masks = check_step(*models, args or example(), dtype=torch.float64, seed=seed, left_alone=left_alone)
    return {name: mask for name, mask in masks.items() if not (mask == 1).all()}


def share(mask: Tensor) -> float:
    return float((mask == 0).double().mean())


@pytest.fixture(params=PATTERNS)
def models(request: pytest.FixtureRequest) -> Models:
    """Dropout, LSTM of two layers, Dropout, Linear: the original and the compiled one, traced once."""
    models = pair(CASES["lstm_states"], torch.float64, pattern=request.param)
    assert set(check(models)) == set(ALL)
    return models


# -- what does not trace anew ---------------------------------------------------------------------------------------


def test_lengths_and_batch_sizes(models: Models) -> None:
    check(models, *example(6, 3))  # what changes once is an input from then on
    traces = shared.rewritten
    for length, batch in ((5, 4), (9, 4), (2, 7), (5, 32), (9, 2)):
        check(models, *example(length, batch))
    assert shared.rewritten == traces


def test_one_step_and_one_sequence(models: Models) -> None:
    for length, batch in ((1, 4), (5, 1), (1, 1), (6, 3), (1, 2), (4, 1)):
        check(models, *example(length, batch))
    traces = shared.rewritten
    for length, batch in ((1, 3), (5, 4), (7, 1), (1, 1)):
        check(models, *example(length, batch))
    assert shared.rewritten == traces


def test_rate_schedule_inside(models: Models) -> None:
    traces = shared.rewritten
    for step, p in enumerate((0.3, 0.45, 0.6, 0.75, 0.3)):
        for model in models:
            model.rnn.dropout = p
        masks = check(models, seed=step)
        limit = 0.02 if models[1]._dropfx.options.pattern.__class__.__name__ != "Row" else 1.0  # in the mean over draws
        assert abs(share(masks["rnn.dropout[0]"]) - p) <= limit
    assert shared.rewritten <= traces + 1  # from the first change on it is an input


def test_state_carried_from_call_to_call(models: Models) -> None:
    x, state = example()
    traces = shared.rewritten
    for step in range(3):
        check(models, x, state, seed=step)
        with torch.no_grad():
            _, state = models[1](x, state)
        state = tuple(part.detach() for part in state)
    assert shared.rewritten <= traces + 2  # under no_grad, and with a state that asks for no gradient


# -- live switches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_ends_of_the_range(models: Models, p: float) -> None:
    for rate in (p, 0.5, p):
        for model in models:
            model.rnn.dropout = rate
        masks = check(models)
        assert ("rnn.dropout[0]" in masks) == (rate == 0.5)
        assert {"drop1", "drop2"} <= set(masks)


def test_rate_of_one_gives_the_second_layer_zeros() -> None:
    original, compiled = pair(CASES["lstm_alone"], torch.float64)
    for model in (original, compiled):
        model.dropout = 1.0
    (x,) = steps()(3, Draw(torch.float64, 0))
    outcome, masks = compiled_run(compiled, (x,))
    comparison.compare(outcome, oracle.oracle_run(original, masks, (x,)), torch.float64)
    assert not outcome.grads["weight_ih_l1"].any()


def test_train_and_eval(models: Models) -> None:
    original, compiled = models
    x, state = example()
    for _ in range(2):
        for model in models:
            model.eval()
        with recording() as masks:
            ours, theirs = compiled(x, state), original(x, state)
        assert not masks
        assert all(torch.equal(a, b) for a, b in zip(flat(ours), flat(theirs), strict=True))
        for model in models:
            model.train()
        assert set(check(models)) == set(ALL)


def flat(value: Any) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(value))


def test_recurrent_module_alone_in_eval(models: Models) -> None:
    for live in (False, True, False):
        for model in models:
            model.rnn.train(live)
        # as written, it needs all units of its input
        assert set(check(models, left_alone=() if live else ("drop1",))) == (set(ALL) if live else {"drop2"})


def test_recurrent_module_alone_in_training(models: Models) -> None:
    """Monte-Carlo dropout."""
    for model in models:
        model.eval()
        model.rnn.train()
    assert set(check(models)) == {"rnn.dropout[0]"}


def test_disabled(models: Models) -> None:
    original, compiled = models
    x, state = example()
    for model in (original.drop1, original.drop2):
        model.p = 0.0
    original.rnn.dropout = 0.0
    with dropfx.disabled():
        ours, _ = compiled_run(compiled, (x, state))
    comparison.compare(ours, oracle.run(original, (x, state)), torch.float64)


# -- the same model -------------------------------------------------------------------------------------------------


def test_restored(models: Models) -> None:
    original, compiled = models
    keys = list(original.state_dict())
    assert list(compiled.state_dict()) == keys
    assert dropfx.restore(compiled) is compiled
    assert type(compiled.rnn) is nn.LSTM
    torch.manual_seed(3)
    ours = compiled(*example())
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(flat(ours), flat(original(*example())), strict=True))


@pytest.mark.parametrize("name", ["lstm_states", "lstm_alone", "lstm_cannot_be_traced", "lstm_with_hooks"])
def test_adopted_parts_are_restored(name: str) -> None:
    case = CASES[name]
    compiled = case.make()
    classes = [type(module) for module in compiled.modules()]
    dropfx.compile(compiled, min_speedup=0)
    args, _ = case.call(4)
    compiled(*args)
    dropfx.restore(compiled)
    assert [type(module) for module in compiled.modules()] == classes
    assert not any("_dropfx" in module.__dict__ for module in compiled.modules())
    with recording() as masks:
        compiled(*args)
    assert not masks


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("name", ["lstm_states", "lstm_alone", "lstm_cannot_be_traced"])
def test_copied_and_saved(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    """A copy has weights of its own."""
    case = CASES[name]
    original, compiled = pair(case, torch.float64)
    args, _ = case.call(4, torch.float64)
    compiled(*args)
    made = copied(compiled)
    assert isinstance(made, type(original))
    with torch.no_grad():
        for parameter in compiled.parameters():
            parameter.zero_()
    masks = check_step(original, made, args, dtype=torch.float64)
    assert set(masks) == set(case.rewritten)


def test_weights_replaced(models: Models) -> None:
    check(models)
    for change in ("parameter", "data", "load", "frozen"):
        torch.manual_seed(7)
        new = {name: 0.1 * torch.randn_like(value) for name, value in models[0].rnn.state_dict().items()}
        for model in models:
            if change == "parameter":
                model.rnn.weight_hh_l1 = nn.Parameter(new["weight_hh_l1"].clone())
            elif change == "data":
                model.rnn.weight_ih_l0.data = new["weight_ih_l0"].clone()
            elif change == "load":
                model.rnn.load_state_dict(new)
            else:
                model.rnn.weight_ih_l1.requires_grad_(False)
                model.rnn.bias_hh_l0.requires_grad_(False)
        assert set(check(models)) == set(ALL), change


def test_module_replaced(models: Models) -> None:
    for model in models:
        torch.manual_seed(5)
        model.rnn = nn.LSTM(64, 64, 3, dropout=0.25).double()
    args = steps(3, 3)(4, Draw(torch.float64, 0))
    assert set(check(models, *args)) == {*ALL, "rnn.dropout[1]"}


@pytest.mark.parametrize("first", [True, False])
def test_functional_call(first: bool) -> None:
    """The given weights are used, and what was traced with them holds for the model's own."""
    original, compiled = pair(CASES["lstm_states"], torch.float64)
    given = {name: 0.5 * value.detach() for name, value in compiled.named_parameters()}
    for other in (first, not first):
        if not other:
            assert set(check((original, compiled))) == set(ALL)
            continue
        with recording() as masks:
            ours = torch.func.functional_call(compiled, given, example())
        with oracle.replaced_dropout(original, masks):
            theirs = torch.func.functional_call(original, given, example())
        assert masks.keys() == set(ALL)
        for one, another in zip(flat(ours), flat(theirs), strict=True):
            assert not comparison.difference(one.detach(), another.detach(), 1e-10, 0.0)


class Substituted(nn.Module):
    """Calls a part with a weight that it computes."""

    def __init__(self, part: nn.Module, name: str) -> None:
        super().__init__()
        self.part, self.name, self.scale = part, name, nn.Parameter(torch.tensor(0.5))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(64, 8)
        self.other = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.part.get_parameter(self.name) * self.scale
        out = torch.func.functional_call(self.part, {self.name: weight}, (self.other(x),))
        return self.head(self.drop(out[0] if isinstance(out, tuple) else out))


@pytest.mark.parametrize(
    ("part", "name"), [(LSTM(), "weight_hh_l0"), (LSTM(), "weight_ih_l1"), (nn.LayerNorm(64), "weight")]
)
def test_functional_call_inside(part: nn.Module, name: str) -> None:
    """Values of the trace in place of parameters: what stays a call would not see them."""
    assert_equivalent(Substituted(part, name).double(), torch.randn(5, 3, 64).double(), options={"min_speedup": 0})


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    """The second forward, in backward, draws what the first one drew."""
    original, compiled = (torch.nn.ModuleDict({"net": m}) for m in pair(CASES["lstm_alone"], torch.float64))
    (x,) = steps()(3, Draw(torch.float64, 0))
    x.requires_grad_()
    with dropfx.testing.record() as recorded:
        out, _ = torch.utils.checkpoint.checkpoint(compiled["net"], x, use_reentrant=reentrant)
        out.square().sum().backward()
    got, x.grad = x.grad, None
    if reentrant:  # the other kind leaves its second forward as soon as it has what it needs
        assert torch.equal(recorded[0]["dropout[0]"], recorded[1]["dropout[0]"])
    with oracle.replaced_dropout(original["net"], recorded[0]):
        original["net"](x)[0].square().sum().backward()
    torch.testing.assert_close(got, x.grad)
    for ours, theirs in zip(compiled.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_autocast() -> None:
    """The recurrence runs in the dtype that autocast gives the product of the inputs."""
    compiled = dropfx.compile(CASES["lstm_states"].make(), min_speedup=0)
    whole = CASES["lstm_states"].make()
    args = example(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low, masks = compiled_run(compiled, args)
    full = oracle.oracle_run(whole, masks, args)
    assert set(masks) == set(ALL)
    assert low.outputs["[0]"].dtype is torch.bfloat16
    for name, want in full.grads.items():
        assert low.grads[name].dtype is torch.float32
        assert not comparison.difference(low.grads[name], want, 5e-2, 0.0), name


# -- what is wrong with a call --------------------------------------------------------------------------------------


def wrong_calls() -> dict[str, tuple[Any, ...]]:
    x, (h, c) = example()
    return {
        "features": (x[..., :60], (h, c)),
        "state's units": (x, (h[..., :60], c)),
        "state's layers": (x, (h[:1], c[:1])),
        "state's batch": (x, (h[:, :3], c[:, :3])),
        "rank": (x[None], None),
        "dtype": (x.float(), None),
        "no steps": (x[:0], None),
        "state of a GRU": (x, h),
    }


@pytest.mark.parametrize(("what", "traced"), [*((what, True) for what in wrong_calls()), ("features", False)])
def test_errors_are_those_of_the_module(what: str, traced: bool) -> None:
    original, compiled = pair(CASES["lstm_states"], torch.float64)
    if traced:
        compiled(*example())
    with pytest.raises(Exception) as theirs:  # noqa: PT011  # whatever it is
        original(*wrong_calls()[what])
    with pytest.raises(theirs.type) as ours:
        compiled(*wrong_calls()[what])
    assert str(ours.value) == str(theirs.value)
    assert set(check((original, compiled))) == set(ALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["lstm_states", "gru_dropout", "rnn_tanh"])
def test_no_sequences(name: str, dtype: torch.dtype) -> None:
    original, compiled = pair(CASES[name], dtype)
    for batch in (0, 4, 0):
        args, _ = CASES[name].call(batch, dtype)
        assert set(check_step(original, compiled, args, dtype=dtype)) == set(ALL)


# -- variants -------------------------------------------------------------------------------------------------------


def variants() -> list[tuple[Any, ...]]:
    made = itertools.product(
        (nn.LSTM, nn.GRU, nn.RNN), (False, True), (False, True), (True, False), (0, 32), (1, 3), (False, True)
    )
    return [(cls, *rest) for cls, *rest in made if cls is nn.LSTM or not rest[3]]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "bidirectional", "batch_first", "bias", "proj", "layers", "unbatched"), variants())
def test_every_combination(
    cls: Any, bidirectional: bool, batch_first: bool, bias: bool, proj: int, layers: int, unbatched: bool
) -> None:
    given = {"proj_size": proj} if proj else {}
    given |= {"bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    model = Around(cls(64, 64, layers, dropout=0.5 if layers > 1 else 0.0, **given)).double()
    x = torch.randn(5, 64, dtype=torch.float64) if unbatched else torch.randn(5, 3, 64, dtype=torch.float64)
    report = dropfx.explain(model, x, options={"min_speedup": 0})
    assert [site.name for site in report.sites if site.rewritten] == [
        "drop1",
        *(f"rnn.dropout[{gap}]" for gap in range(layers - 1)),
        "drop2",
    ]
    assert_equivalent(model, x.requires_grad_(), options={"min_speedup": 0})


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_weights(cls: Any) -> None:
    """Sizes at which the recurrence packs its weight or PyTorch's function takes over."""
    model = Around(cls(64, 512, 2, dropout=0.5))
    assert_equivalent(model, torch.randn(10, 4, 64), options={"min_speedup": 0})


@pytest.mark.parametrize(
    ("pattern", "groups"), [("block", 1), ("slice", 1), ("row", 1), ("tile", 1), ("block", 2), ("slice", 2), ("row", 2)]
)
def test_patterns(pattern: str, groups: int) -> None:
    for name in ("lstm_tied", "gru_bidirectional"):
        case = CASES[name]
        args, _ = case.call(4, torch.float64)
        options = {"pattern": pattern, "groups": groups, "min_speedup": 0}
        assert_equivalent(case.make(torch.float64), *args, options=options)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_tiles(bidirectional: bool) -> None:
    """Weights of the layers' inputs drop tiles, those of the recurrences never: the original with masked weights."""
    torch.manual_seed(0)
    original = Around(LSTM(bidirectional=bidirectional)).double()
    compiled = dropfx.compile(copy.deepcopy(original), pattern=dropfx.patterns.Tile((16, 16)), min_speedup=0)
    ends = ("", "_reverse") if bidirectional else ("",)
    weights = {"drop2": "head.weight"}
    for site, layer in (("drop1", 0), ("rnn.dropout[0]", 1)):
        for place, end in enumerate(ends):
            weights[f"{site}[{place}]" if bidirectional else site] = f"rnn.weight_ih_l{layer}{end}"
    for dropout in (original.drop1, original.drop2):
        dropout.p = 0.0
    original.rnn.dropout = 0.0
    x = torch.randn(5, 3, 64, dtype=torch.float64)
    for _ in range(3):
        outcome, masks = compiled_run(compiled, (x,))
        assert set(masks) == set(weights)
        values = dict(original.named_parameters())
        given = values | {weights[name]: values[weights[name]] * mask for name, mask in masks.items()}
        original.zero_grad()
        out = torch.func.functional_call(original, given, (x,))
        (out * oracle.cotangent(out, 0)).sum().backward()
        torch.testing.assert_close(outcome.outputs[""], out)
        for name, value in values.items():
            torch.testing.assert_close(outcome.grads[name], value.grad)
