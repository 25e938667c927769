"""Recurrent networks under torch.compile: captured whole, rewritten as under dropfx.compile, eval as it was."""

from __future__ import annotations

import copy
import itertools
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dropfx
from tests.catalogue import CASES
from tests.catalogue.recurrent import BOTH, GRU, LSTM, RNN, Around, Noisy, RecurrentLM, WeightDrop, WeightDropOutside
from tests.frontend.steps import Call, captured, check, slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
INNER = ["eager", "aot_eager", slow("inductor")]
SITES = {"drop1", "rnn.dropout[0]", "drop2"}


def language_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    return RecurrentLM(dropout=0.5, tied=True).to(dtype)


@pytest.fixture(autouse=True)
def _no_counts() -> None:
    counters.clear()


def whole(model: nn.Module, inner: str, **options: Any) -> nn.Module:
    """Compiled, with an error where a graph breaks."""
    given = {"inner": inner, "min_speedup": 0, **options}
    return torch.compile(copy.deepcopy(model), backend="dropfx", fullgraph=True, options=given)


def tokens(batch: int = 3, length: int = 6) -> Tensor:
    return torch.randint(50, (batch, length))


def all_results(call: Call, model: nn.Module, x: Tensor) -> Tensor:
    """Decoded words and the last states, all of which the loss reads."""
    y, (h, c) = call(x)
    (y.square().sum() + h.sum() + c.square().sum()).backward()
    return torch.cat([y.flatten(), h.flatten(), c.flatten()])


# -- promise 2 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["block", "slice", "row"])
@pytest.mark.parametrize("inner", INNER)
def test_language_model(inner: str, pattern: str) -> None:
    original = language_model()
    check(original, whole(original, inner, pattern=pattern), all_results, tokens(), sites=SITES)


@pytest.mark.parametrize("inner", ["aot_eager", slow("inductor")])
def test_single_precision(inner: str) -> None:
    """In which eager graphs have oneDNN's function, and these our op."""
    original = language_model(torch.float32)
    check(original, whole(original, inner), all_results, tokens(), sites=SITES, dtype=torch.float32)


def output_alone(call: Call, model: nn.Module, x: Tensor) -> Tensor:
    y = call(x)
    y.square().sum().backward()
    return y


VARIANTS = {
    "projected, bidirectional": lambda: LSTM(proj_size=32, bidirectional=True),
    "no bias": lambda: LSTM(bias=False),
    "gru": GRU,
    "rnn_tanh": RNN,
    "rnn_relu": lambda: RNN(nonlinearity="relu", bidirectional=True),
}


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str) -> None:
    original = Around(VARIANTS[name]()).double()
    check(original, whole(original, "aot_eager"), output_alone, torch.randn(5, 3, 64).double(), sites=SITES)


@pytest.mark.parametrize("inner", ["aot_eager", slow("inductor")])
def test_frozen_weights(inner: str) -> None:
    original = language_model()
    for name, parameter in original.named_parameters():
        parameter.requires_grad_("hh" not in name and "l0" not in name)
    check(original, whole(original, inner), all_results, tokens(), sites=SITES)


class Plain(nn.Module):
    """Nothing drops inside of the recurrent module, and outside of it where asked."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.rnn, self.drop, self.head = nn.LSTM(64, 64, 2), nn.Dropout(p), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.rnn(x)[0]))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("inner", INNER)
def test_no_dropout_inside(inner: str, p: float) -> None:
    original, x = Plain(p).double(), torch.randn(5, 3, 64).double()
    compiled = whole(original, inner)
    if p:
        check(original, compiled, output_alone, x, sites={"drop"})
        return
    ours, theirs = output_alone(compiled, compiled, x), output_alone(original, original, x)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(compiled.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


# -- WeightDrop and subclasses --------------------------------------------------------------------------------------


def dropped(rnn: nn.Module) -> nn.Module:
    model = Around(nn.LSTM(64, 64)).double()
    model.rnn = rnn.double()  # type: ignore[assignment]
    return model


WEIGHT = "rnn:dropout_1"
DROPPED = {
    "lstm": (lambda: WeightDrop(nn.LSTM(64, 64)), {WEIGHT}),
    "rows": (lambda: WeightDrop(nn.LSTM(64, 64), variational=True), {WEIGHT}),
    "gru": (lambda: WeightDrop(nn.GRU(64, 64)), {WEIGHT}),
    "layers": (lambda: WeightDrop(LSTM(), BOTH), {WEIGHT, "rnn:dropout_2", "rnn.dropout[0]"}),
    "subclass": (lambda: Noisy(64, 64, 2, dropout=0.5), {"rnn.dropout[0]"}),
}


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic")
@pytest.mark.parametrize("pattern", ["block", slow("slice"), slow("row")])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", DROPPED)
def test_dropped_weights(name: str, inner: str, pattern: str) -> None:
    build, sites = DROPPED[name]
    original = dropped(build())
    compiled = whole(original, inner, pattern=pattern)
    for step in range(2):
        x = torch.randn(5, 3, 64, dtype=torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            check(original, compiled, output_alone, x, sites={"drop1", *sites, "drop2"})


def test_dropped_weights_leave_what_the_model_leaves() -> None:
    """Dynamo's graph returns the dropped weight, which it writes behind the graph."""
    compiled = whole(dropped(WeightDrop(nn.LSTM(64, 64))), "aot_eager")
    with dropfx.testing.record() as masks:
        compiled(torch.randn(5, 3, 64, dtype=torch.float64))
    inner = compiled.rnn.module
    torch.testing.assert_close(inner.weight_hh_l0, inner.weight_hh_l0_raw * masks[0][WEIGHT])


def test_groups_leave_one_draw_of_a_weight() -> None:
    original = dropped(WeightDrop(nn.LSTM(64, 64)))
    x = torch.randn(6, 4, 64, dtype=torch.float64)
    check(original, whole(original, "aot_eager", groups=2), output_alone, x, sites={"drop1", WEIGHT, "drop2"})


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which Dynamo asks of what a graph before left
def test_a_graph_broken_before_the_call_leaves_the_weight() -> None:
    """fastai's filter of warnings breaks Dynamo's graph between the write and the call (PyTorch 2.13)."""
    compiled = captured(dropped(WeightDropOutside(nn.LSTM(64, 64))))
    with dropfx.testing.record() as masks:
        compiled(torch.randn(5, 3, 64, dtype=torch.float64)).sum().backward()
    assert {name for frame in masks for name in frame} == {"drop2"}


@pytest.mark.parametrize("name", ["weight_drop", "weight_drop_outside"])
def test_compiled_by_both(name: str) -> None:
    model = torch.compile(dropfx.compile(CASES[name].make(), min_speedup=0), backend="aot_eager")
    with dropfx.testing.record() as masks:
        model(*CASES[name].call(4)[0])[0].sum().backward()
    assert WEIGHT in masks[0]


# -- promise 1 ------------------------------------------------------------------------------------------------------


# in float64 AOTAutograd's own decomposition of the decoder rounds otherwise
@pytest.mark.parametrize(
    ("inner", "dtype"), [("eager", torch.float32), ("eager", torch.float64), ("aot_eager", torch.float32)]
)
def test_eval_is_bit_equal_to_the_model(inner: str, dtype: torch.dtype) -> None:
    original, x = language_model(dtype), tokens()
    compiled = whole(original, inner)
    all_results(compiled, compiled, x)
    original.eval()
    compiled.eval()
    for grad_mode in (True, False, True):
        with torch.set_grad_enabled(grad_mode), dropfx.testing.record() as masks:
            (ours, (h, c)), (theirs, (their_h, their_c)) = compiled(x), original(x)
        assert not masks
        assert torch.equal(ours, theirs)
        assert torch.equal(h, their_h)
        assert torch.equal(c, their_c)
    compiled.zero_grad()
    torch.testing.assert_close(all_results(compiled, compiled, x), all_results(original, original, x))
    for one, other in zip(compiled.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.slow
def test_eval_under_inductor() -> None:
    original, x = language_model(torch.float32).eval(), tokens()
    compiled = whole(original, "inductor").eval()
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            torch.testing.assert_close(compiled(x)[0], original(x)[0])


# -- compilations ---------------------------------------------------------------------------------------------------


class Carried(nn.Module):
    """A language model whose states come and go, as truncated backpropagation through time has them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.drop, self.rnn = nn.Embedding(50, 64), nn.Dropout(0.5), LSTM()
        self.decoder = nn.Linear(64, 50)

    def forward(self, ids: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, state = self.rnn(self.drop(self.emb(ids)), state)
        return self.decoder(self.drop(h)), state


@pytest.mark.parametrize("inner", ["eager", "aot_eager", slow("inductor")])
def test_steps_with_a_carried_state_compile_once(inner: str) -> None:
    compiled = whole(Carried(), inner)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    state: Any = (torch.zeros(2, 3, 64), torch.zeros(2, 3, 64))
    draws, carried = set(), []
    for step in range(6):
        with torch._dynamo.config.patch(error_on_recompile=step > 0), dropfx.testing.record() as masks:
            y, state = compiled(torch.randint(50, (6, 3)), state)
            y.square().mean().backward()
        state = tuple(part.detach() for part in state)
        carried.append(state[0])
        assert set(masks[0]) == {"drop", "rnn.dropout[0]", "drop#2"}
        draws.add(masks[0]["rnn.dropout[0]"].numpy().tobytes())
        optimizer.step()
        optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] == 1
    assert len(draws) > 3
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(carried))


@pytest.mark.parametrize("inner", ["aot_eager", slow("inductor")])
def test_sizes(inner: str) -> None:
    """No more graphs than Dynamo makes by itself: to it the sizes of a recurrent function are fixed (PyTorch 2.13)."""
    sizes, original = ((3, 6), (5, 9), (3, 7), (5, 9)), language_model()
    plain = torch.compile(copy.deepcopy(original), backend="eager", fullgraph=True)
    for batch, length in sizes:
        plain(tokens(batch, length))
    by_itself = counters["stats"]["unique_graphs"]
    counters.clear()
    compiled = whole(original, inner)
    for batch, length in sizes:
        check(original, compiled, all_results, tokens(batch, length), sites=SITES)
    assert counters["stats"]["unique_graphs"] <= by_itself


def test_switches() -> None:
    compiled = whole(language_model(), "aot_eager")
    for turn in range(3):
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            for live in (True, False):
                compiled.train(live)
                with dropfx.testing.record() as masks:
                    compiled(tokens())
                assert [set(frame) for frame in masks if frame] == ([SITES] if live else [])


def test_disabled() -> None:
    original, x = language_model(), tokens()
    compiled = captured(original)
    for module in (original.drop1, original.drop2):
        module.p = 0.0
    original.rnn.dropout = 0.0
    with dropfx.disabled():
        ours = compiled(x)[0]
    torch.testing.assert_close(ours, original(x)[0])


# -- loading --------------------------------------------------------------------------------------------------------

PROGRAM = """
import torch, torch._dynamo
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.drop, self.head = nn.LSTM(64, 64, 2, dropout=0.5), nn.Dropout(0.5), nn.Linear(64, 8)
    def forward(self, x):
        return self.head(self.drop(self.rnn(x)[0]))
net = torch.compile(Net(), backend="dropfx", options={"inner": "eager", "min_speedup": 0})
net(torch.randn(5, 3, 64)).sum().backward()
import dropfx
with dropfx.testing.record() as masks:
    net(torch.randn(5, 3, 64))
print(torch._dynamo.config.allow_rnn, sorted({name for frame in masks for name in frame}))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "True ['drop', 'rnn.dropout[0]']"), ("0", "False []")],
)
def test_environment(given: str | None, expected: str) -> None:
    """The entry point alone lets Dynamo into recurrent modules; a variable keeps it out of them."""
    environment = {name: value for name, value in os.environ.items() if name != "DROPFX_ALLOW_RNN"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({} if given is None else {"DROPFX_ALLOW_RNN": given})
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False
    )
    assert made.stdout.strip() == expected, made.stderr


def test_without_fullgraph_nothing_falls_back_to_eager() -> None:
    """An op whose sizes a compiler refuses would be a graph break, which only fullgraph makes an error."""
    torch.manual_seed(0)
    layers, x = torch.nn.LSTM(64, 64, 2, dropout=0.5), torch.randn(5, 3, 64)
    compiled = torch.compile(layers, backend="dropfx", options={"inner": "aot_eager", "min_speedup": 0})
    with dropfx.testing.record() as masks:
        compiled(x)[0].sum().backward()
    assert [list(drawn) for drawn in masks] == [["dropout[0]"]]
