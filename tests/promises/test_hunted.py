"""What adversarial reading and fuzzing found, each a model that once came out wrong."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import dropfx
from dropfx.patterns import Block, Tile
from tests.catalogue.case import check_step, mlp


class Net(nn.Module):
    """32 -> 64 -> 8 with a forward of choice."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(32, 64), nn.Linear(64, 8), nn.Linear(64, 8), nn.Dropout(0.5)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def pair(forward: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = Net(forward).double()
    return original, dropfx.compile(copy.deepcopy(original), **{"min_speedup": 0, **options})


def product_of_slices(m: Net, x: Tensor) -> Tensor:
    return m.b(m.d(F.relu(m.a(x[1:]))) * m.a(x)[:1])


def sum_of_slices(m: Net, x: Tensor) -> Tensor:
    return m.b(m.d(m.a(x[:-1]) + m.a(x[:1])))


@pytest.mark.parametrize("options", [{}, {"pattern": "slice"}, {"pattern": Block(7)}, {"pattern": "row"}], ids=str)
@pytest.mark.parametrize("forward", [product_of_slices, sum_of_slices])
def test_groups_where_the_leading_axis_was_1_in_the_trace(forward: Any, options: dict[str, Any]) -> None:
    original, compiled = pair(forward, groups=2, **options)
    for rows in (2, 6, 3, 2, 9):
        x = torch.randn(rows, 5, 32, dtype=torch.float64)
        check_step(original, compiled, (x,), dtype=torch.float64, seed=rows)


@pytest.mark.parametrize("pattern", ["block", Block(7), "row"], ids=str)
def test_groups_of_a_linear_called_by_keywords(pattern: Any) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(m.d(F.linear(weight=m.a.weight, bias=m.a.bias, input=x)))

    original, compiled = pair(forward, groups=2, pattern=pattern)
    masks = check_step(original, compiled, (torch.randn(70, 32, dtype=torch.float64),), dtype=torch.float64)
    assert masks["d"].shape == (70, 64)


@pytest.mark.parametrize("pattern", ["block", "tile"])
@pytest.mark.parametrize("width", [256, 512, 768])
def test_plan_is_the_same_under_no_grad(width: int, pattern: str) -> None:
    """Reentrant checkpointing runs the first forward under no_grad: it must not decide otherwise."""
    for batch in (16, 18, 20, 22, 32):
        model = dropfx.compile(mlp(width, width, width), pattern=pattern)
        frames = []
        with dropfx.testing.record() as recorded:
            out = checkpoint(model, torch.randn(batch, width, requires_grad=True), use_reentrant=True)
            frames.append(set(recorded[0]))
            out.sum().backward()
            frames.append(set(recorded[-1]))
        assert frames[0] == frames[1]


def test_parametrize_cache_is_the_users() -> None:
    inner = nn.Linear(32, 64)
    parametrize.register_parametrization(inner, "weight", nn.Dropout(0.5))
    model = dropfx.compile(nn.Sequential(inner, nn.ReLU(), nn.Dropout(), nn.Linear(64, 8)), pattern=Tile((4, 4)))
    x = torch.randn(3, 32)
    with parametrize.cached():
        assert type(model(x)) is Tensor
    model(x)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model(x)) is Tensor
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"pattern": "slice"}, {"pattern": "row"}], ids=str)
def test_empty_batch_in_a_view_of_named_sizes(options: dict[str, Any]) -> None:
    original, compiled = pair(lambda m, x: m.b(m.d(m.a(x)).reshape(x.size(0) * x.size(1), 64)), **options)
    for shape in ((0, 5, 32), (3, 5, 32), (0, 5, 32)):
        check_step(original, compiled, (torch.randn(shape, dtype=torch.float64),), dtype=torch.float64)


def test_torch_func_transforms_run_as_written() -> None:
    model = dropfx.compile(mlp(8, 64, 4), min_speedup=0)
    parameters, x = dict(model.named_parameters()), torch.randn(5, 8)
    model(x)

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given, (x,)).square().sum()

    assert torch.func.grad(loss)(parameters).keys() == parameters.keys()
    assert torch.func.vmap(model, randomness="same")(x).shape == (5, 4)


@pytest.mark.parametrize("options", [{"pattern": "tile"}, {"pattern": Tile((8, 8))}, {}], ids=str)
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.b(F.dropout(m.a(x), 0.5, True, True)),
        lambda m, x: (m.c(m.d(m.a(x))), m.b(F.dropout(m.a(x))))[1],
        lambda m, x: m.b(m.d(m.a(x))) - m.c(m.d(m.a(x))),
        lambda m, x: m.b(m.d(m.a(x))) * F.linear(x, m.a.weight[0])[..., None],
    ],
    ids=["inplace", "dead", "twice", "vector_weight"],
)
def test_assert_equivalent(forward: Any, options: dict[str, Any]) -> None:
    for _ in range(4):
        dropfx.testing.assert_equivalent(Net(forward), torch.randn(6, 32), options={"min_speedup": 0, **options})


def test_vector_weight_loses_no_site() -> None:
    model = Net(lambda m, x: m.b(m.d(m.a(x))) * F.linear(x, m.a.weight[0])[..., None])
    assert [s.rewritten for s in dropfx.explain(model, torch.randn(6, 32), options={"min_speedup": 0}).sites] == [True]


def test_tiles_of_a_part_called_twice_have_one_kind_of_name() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.d, self.b, self.c = nn.Dropout(), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            h = self.d(x)
            return self.b(h) + self.c(h)

    class Whole(nn.Module):
        def __init__(self, hooked: bool) -> None:
            super().__init__()
            self.part = Part()
            if hooked:
                self.part.register_forward_hook(lambda *_: None)

        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.part(x))

    expected = {"part.d[0]", "part.d[1]", "part.d#2[0]", "part.d#2[1]"}
    for hooked in (False, True):
        model = dropfx.compile(Whole(hooked), pattern="tile", min_speedup=0)
        with dropfx.testing.record() as masks:
            model(torch.randn(4, 64))
        assert set(masks[0]) == expected
        dropfx.testing.assert_equivalent(model, torch.randn(4, 64))


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"pattern": "row"}, {"pattern": "tile"}], ids=str)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_leaves_float64(inner: str, options: dict[str, Any]) -> None:
    """As PyTorch's own products do: a gathered one gave bfloat16 in place of float64."""
    torch._dynamo.reset()
    model = Net(lambda m, x: m.b(m.d(F.relu(m.a(x))))).double()
    compiled = torch.compile(model, backend="dropfx", options={"inner": inner, "min_speedup": 0, **options})
    x = torch.randn(64, 32, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(x)
    assert out.dtype == torch.float64
    out.sum().backward()
    assert model.a.weight.grad is not None


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_statistics_of_a_normalisation_that_nobody_reads(inner: str) -> None:
    """Its running statistics are written all the same: it went as dead code."""

    class Normalised(Net):
        def __init__(self) -> None:
            super().__init__(lambda m, x: (m.norm(m.a(x)), m.b(m.d(F.relu(m.a(x)))))[1])
            self.norm = nn.BatchNorm1d(64)

    torch._dynamo.reset()
    model = Normalised()
    compiled = torch.compile(model, backend="dropfx", options={"inner": inner, "min_speedup": 0})
    compiled(torch.randn(8, 32))
    assert model.norm.running_mean.abs().max() > 0


def test_draws_in_a_checkpoint_that_nobody_reads() -> None:
    """They are drawn all the same, as PyTorch's eager backend draws them: what comes behind draws from there."""

    def forward(m: Net, x: Tensor) -> Tensor:
        checkpoint(lambda y: F.dropout(y), x, use_reentrant=False)
        return m.b(m.d(F.relu(m.a(x)))).sum() + F.dropout(x).sum()

    torch._dynamo.reset()
    compiled = torch.compile(Net(forward), backend="dropfx", options={"inner": "eager", "min_speedup": 0})
    x = torch.randn(8, 32)
    torch.manual_seed(0)
    with dropfx.draws.runtime.numbers_of_their_own():
        compiled(x)
    after = torch.rand(4)
    torch.manual_seed(0)
    F.dropout(x)
    F.dropout(x)
    assert torch.equal(after, torch.rand(4))


@pytest.mark.parametrize("options", [{}, {"inner": "eager"}, {"inner": "aot_eager"}], ids=str)
def test_a_write_in_a_checkpoint_whose_result_nobody_reads(options: dict[str, Any]) -> None:
    """torch.fx takes it for dead: its elimination goes into the bodies of checkpoints by rules of its own."""

    def body(m: Net, x: Tensor) -> Tensor:
        hidden = m.a(x)
        hidden.mul_(0.25)
        return hidden

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(m.d(checkpoint(body, m, x, use_reentrant=False)))

    torch._dynamo.reset()
    original = Net(forward)
    model = copy.deepcopy(original)
    if options:
        model.compile(backend="dropfx", options={**options, "min_speedup": 0})
    else:
        dropfx.compile(model, min_speedup=0)
    check_step(original, model, (torch.randn(8, 32),))


@pytest.mark.parametrize("inner", ["", "aot_eager"])
def test_a_write_into_the_input_of_a_recurrent_layer_behind_it(inner: str) -> None:
    """Its own products keep the input for backward; PyTorch's keep a copy, since the batch is first."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(32, 16, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            out, _ = self.rnn(x)
            x.narrow(0, 0, 1).mul_(3.0)
            return out.sum() + x.sum()

    torch._dynamo.reset()
    original = Written()
    model = copy.deepcopy(original)
    if inner:
        model.compile(backend="dropfx", options={"inner": inner, "min_speedup": 0})
    else:
        dropfx.compile(model, min_speedup=0)
    check_step(original, model, (torch.randn(5, 6, 32),))


def written_behind_a_dropout_of_nothing(m: Net, x: Tensor) -> Tensor:
    hidden = m.a(x)
    same = m.d(hidden)
    hidden.mul_(2)
    return m.b(same)


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.5, 0.0, 0.5, 0.0)])
def test_a_dropout_of_rate_0_returns_its_input_itself(rates: tuple[float, ...]) -> None:
    """Not a copy, so that a write into the input reaches its readers (fuzzed: seed 31, index 1171)."""
    original, compiled = pair(written_behind_a_dropout_of_nothing)
    for seed, rate in enumerate(rates):
        original.d.p = compiled.d.p = rate
        check_step(original, compiled, (torch.randn(8, 32, dtype=torch.float64),), dtype=torch.float64, seed=seed)


def test_a_dropout_in_eval_returns_its_input_itself() -> None:
    original, compiled = pair(written_behind_a_dropout_of_nothing)
    for model in (original, compiled):
        model.d.eval()
    check_step(original, compiled, (torch.randn(8, 32, dtype=torch.float64),), dtype=torch.float64)


def test_an_index_of_a_view_that_was_written_to() -> None:
    """No result of an operation with several, which a write may pass by (fuzzed: seed 31, index 1171)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.b(m.d(F.relu(m.a(x))))
        turned = h.movedim(-1, -2)
        h.clamp_(-0.1, 0.1)
        return turned[..., torch.arange(turned.size(-1) - 1, -1, -1)]

    original, compiled = pair(forward)
    check_step(original, compiled, (torch.randn(8, 32, dtype=torch.float64),), dtype=torch.float64)


class Layers(nn.Module):
    """A recurrent layer, whose results go through a forward of choice."""

    def __init__(self, rnn: nn.RNNBase, forward: Any) -> None:
        super().__init__()
        self.d, self.rnn, self.body = nn.Dropout(0.5), rnn, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.rnn(self.d(x))[0])


def check_layers(rnn: nn.RNNBase, body: Any) -> None:
    original = Layers(rnn, body).double()
    compiled = dropfx.compile(copy.deepcopy(original), min_speedup=0)
    for seed in range(2):
        x = torch.randn(8, 6, 32, dtype=torch.float64)
        masks = check_step(original, compiled, (x,), dtype=torch.float64, seed=seed, left_alone=(":bernoulli_1",))
        assert "d" in masks


def written_view(out: Tensor) -> Tensor:
    first, second = torch.tensor_split(out, 2, dim=-1)
    second += first
    return out * 0.5


def test_a_view_of_what_a_recurrent_layer_returns_is_written_to() -> None:
    """Its backward reads what it returned, not what was made of that (fuzzed: seed 0, index 1029)."""
    check_layers(nn.RNN(32, 16, batch_first=True), written_view)


def test_a_mask_drawn_in_place_is_drawn_in_the_order_of_its_memory() -> None:
    """Of which a functional bernoulli knows nothing (fuzzed: seed 0, index 1055)."""

    def draws(out: Tensor) -> Tensor:
        return torch.empty_like(out).bernoulli_(0.5) + out

    def multiplies(out: Tensor) -> Tensor:
        mask = torch.empty_like(out).bernoulli_(0.5) / 0.5
        return out[..., :1] * mask + mask * 0.5  # no dropout of units

    def drops(out: Tensor) -> Tensor:
        mask = torch.empty_like(out).bernoulli_(0.9) / 0.9  # 30 units have no pattern of this rate
        return out * mask + out * mask

    for body in (draws, multiplies, drops):
        check_layers(nn.GRU(32, 15, num_layers=2, dropout=0.5, batch_first=True, bidirectional=True), body)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_reentrant_checkpoint_without_a_gradient_makes_none(gradient: bool) -> None:
    """Not of the parameters that it reads either; the forward runs as written (fuzzed: seed 0, index 1019)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda h: m.b(m.d(F.relu(m.a(h)))), x, use_reentrant=True)

    original, compiled = pair(forward)
    x = torch.randn(8, 32, dtype=torch.float64)
    warned = pytest.warns(UserWarning, match="None of the inputs") if not gradient else contextlib.nullcontext()
    with warned:
        masks = check_step(original, compiled, (x,), dtype=torch.float64, input_grad=gradient, left_alone=("d",))
    assert bool(masks) == gradient
    assert gradient or "reentrant checkpoint" in compiled._dropfx.capture.left[""]


def test_a_write_reads_rows_that_it_has_written() -> None:
    """What it finds there, PyTorch decides by the order of its writes (fuzzed: seed 0, index 1859)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = x * 1.0
        h.add_(h[:1].expand_as(h), alpha=0.5)
        return m.b(m.d(F.elu(m.a(h))))

    original, compiled = pair(forward)
    check_step(original, compiled, (torch.randn(8, 32, dtype=torch.float64),), dtype=torch.float64)


def test_tiles_behind_a_dropout_under_no_grad() -> None:
    """Nothing flows back through it, though the Linear behind it has a gradient (fuzzed: seed 0, index 1623)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        with torch.no_grad():
            dropped = m.d(h)
        return m.b(dropped) + m.c(h)

    original = Net(forward).double()
    options = {"pattern": "tile", "min_speedup": 0}
    dropfx.testing.assert_equivalent(original, torch.randn(8, 32, dtype=torch.float64), options=options)


def test_a_dropout_as_written_behind_a_normalisation_of_turned_values() -> None:
    """How its result lies, fake tensors do not know (fuzzed: seed 0, index 5013)."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.first, self.norm, self.last = nn.Linear(16, 48), nn.Dropout(), nn.BatchNorm1d(6), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(self.up(x)).transpose(0, -1)))

    original = Turned().double()
    compiled = dropfx.compile(copy.deepcopy(original), min_speedup=0)
    x = torch.randn(5, 6, 16, dtype=torch.float64)
    assert "first" in check_step(original, compiled, (x,), dtype=torch.float64, left_alone=("last",))


@pytest.mark.parametrize("behind", [lambda h: h.view(-1, h.size(-1)), lambda h: h.as_strided(h.shape, h.stride())])
def test_what_reads_how_a_value_lies_behind_turned_sites(behind: Any) -> None:
    """The steps of the sites lead, and those of the values around them do not (fuzzed: seed 0, index 7027)."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(32, 16, batch_first=True)
            self.first, self.drop, self.last = nn.Linear(16, 32), nn.Dropout(), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return behind(self.last(self.drop(self.first(self.rnn(x)[0].contiguous()))))

    original = Steps().double()
    compiled = dropfx.compile(copy.deepcopy(original), min_speedup=0, groups="time")
    x = torch.randn(4, 6, 32, dtype=torch.float64)
    assert set(check_step(original, compiled, (x,), dtype=torch.float64)) == {"drop"}


def test_a_mask_of_the_model_that_nobody_reads_is_drawn() -> None:
    """What is random behind it draws the numbers that it draws in the model (fuzzed: seed 0, index 7749)."""

    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.drop, self.down, self.last = (
                nn.Linear(24, 24),
                nn.Dropout(0.3),
                nn.Linear(24, 48),
                nn.Dropout(),
            )

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            h = self.down(self.drop(F.silu(self.up(x)) * x))
            masked = h * h.new_empty(h.size(0), 1, h.size(2)).bernoulli_(0.25).div(0.25)
            _ = (masked @ masked.mT).softmax(-1) @ masked
            return h, self.last(y)

    original = Unread().double()
    compiled = dropfx.compile(copy.deepcopy(original), min_speedup=0)
    x, y = torch.randn(6, 6, 24, dtype=torch.float64), torch.randn(9, 9, dtype=torch.float64)
    masks = check_step(original, compiled, (x, y), dtype=torch.float64, left_alone=(":bernoulli_1", "last"))
    assert set(masks) == {"drop"}


@pytest.mark.parametrize("rate", [0.0, None])
def test_a_dropout_that_drops_nothing_under_no_grad_is_not_turned(rate: float | None) -> None:
    """It returns its input itself, whose gradient goes on (fuzzed: seed 0, index 9919)."""

    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quiet, self.first, self.drop = nn.Dropout(0.5), nn.Linear(32, 64), nn.Dropout(0.5)
            self.rnn = nn.RNN(64, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                same = self.quiet(x)
            return self.rnn(self.drop(self.first(same) + self.first(x)))[0]

    original = Quiet().double()
    compiled = dropfx.compile(copy.deepcopy(original), min_speedup=0, groups="time")
    for model in (original, compiled):
        model.quiet.p = 0.5 if rate is None else rate
        model.quiet.train(rate is not None)
    x = torch.randn(4, 6, 32, dtype=torch.float64)
    assert set(check_step(original, compiled, (x,), dtype=torch.float64)) == {"drop"}


def test_channels_that_are_flattened_with_steps_of_changing_number() -> None:
    """How many places a channel has in the flat axis is a number of the plan only where no call changes it."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.drop = nn.Linear(16, 64), nn.Dropout1d(0.5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y + self.drop(torch.tanh(self.up(x)).transpose(1, 2)).flatten(1)

    original = Flat().double()
    compiled = dropfx.compile(copy.deepcopy(original), min_speedup=0)
    for steps in (5, 7, 9, 3):
        x, y = torch.randn(4, steps, 16, dtype=torch.float64), torch.randn(4, 64 * steps, dtype=torch.float64)
        assert set(check_step(original, compiled, (x, y), dtype=torch.float64)) == {"drop"}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_rate_that_changes_beside_a_mask_of_changing_rows(inner: str) -> None:
    """Numbers that a mask made by hand is drawn with are spelled out, and sizes are; each at its own node."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.drop = nn.Linear(16, 64), nn.Linear(64, 8), nn.Dropout(1.0)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.new_empty(x.shape[:1] + (1,) * (x.dim() - 1)).bernoulli_(0.5) / 0.5
            return self.down(self.drop(torch.tanh(self.up(x + x * rows))) * 0.5)

    original = Both().double()
    model = copy.deepcopy(original)
    model.compile(backend="dropfx", options={"inner": inner, "min_speedup": 0})
    for rate, rows in ((1.0, 6), (0.5, 3), (0.25, 5)):
        original.drop.p = model.drop.p = rate
        recorded = check_step(original, model, (torch.randn(rows, 7, 16, dtype=torch.float64),), dtype=torch.float64)
        assert set(recorded) == (set() if rate == 1 else {"drop"})
