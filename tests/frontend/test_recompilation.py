"""When Dynamo compiles anew, and when it must not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dropfx
from dropfx.patterns import Row
from tests.catalogue.case import mlp
from tests.frontend.steps import captured, check, one_backward, slow

PATTERNS = ["block", "slice", "row", "tile"]


@pytest.fixture(autouse=True)
def _no_counts() -> None:
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def tanh_mlp(p: float = 0.5) -> nn.Module:
    return mlp(48, 96, 96, 8, activation=nn.Tanh, p=p).double()


def run_steps(compiled: nn.Module, steps: int) -> None:
    """Training steps of three batch sizes, the first ones free to compile."""
    optimizer = torch.optim.SGD(compiled.parameters(), lr=1e-3)
    draws = set()
    for step in range(steps):
        x = torch.randn((4, 6, 7)[step % 3], 48)
        with torch._dynamo.config.patch(error_on_recompile=step > 2), dropfx.testing.record() as masks:
            compiled(x).square().sum().backward()
        assert set(masks[0]) == {"2"}
        draws.add(masks[0]["2"].numpy().tobytes())
        optimizer.step()
        optimizer.zero_grad()
    assert len(draws) >= 5  # a row pattern of three periods has five or six


@pytest.mark.parametrize(
    ("pattern", "inner"),
    [
        *[("block", "aot_eager"), ("row", "eager"), slow("slice", "eager"), slow("tile", "eager")],
        *[slow("block", "eager"), slow("row", "aot_eager"), slow("slice", "aot_eager"), slow("tile", "aot_eager")],
    ],
)
def test_a_thousand_steps(pattern: str, inner: str) -> None:
    run_steps(captured(mlp(48, 96, 8), inner=inner, pattern=pattern), 1000)
    assert graphs() <= 2  # one size, then any size


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_thousand_steps_of_inductor(pattern: str) -> None:
    run_steps(captured(mlp(48, 96, 8), inner="inductor", pattern=pattern), 1000)
    assert graphs() <= 2


class Few(Row):
    """Keeps one unit in its first draw."""

    def choose(self, hashed: Tensor, fit: Any) -> Any:
        kept = super().choose(hashed, fit)
        while not self.__dict__.get("begun") and kept[0].starts.size(-1) * kept[0].run > 1:
            hashed = hashed + 0x9E3779B97F4A7C1
            kept = super().choose(hashed, fit)
        object.__setattr__(self, "begun", True)
        return kept


@pytest.mark.parametrize("inner", ["aot_eager", slow("inductor")])
def test_one_kept_unit_in_the_draw_that_is_compiled_with(inner: str) -> None:
    original = mlp(48, 8, 8, activation=nn.Tanh, p=0.75).double()
    compiled = captured(original, inner=inner, pattern=Few(max_period=8))
    counts = set()
    for step in range(12):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            masks = check(original, compiled, one_backward, torch.randn(6, 48).double(), sites={"2"})
        counts.add(int(masks[0]["2"].count_nonzero()))
    assert {1, 2} <= counts


DYNAMIC = [True, False, None]


@pytest.mark.parametrize("options", [{}, {"pattern": "row"}, slow({"groups": 2}), slow({"pattern": "slice"})], ids=str)
@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_batch_sizes(dynamic: bool | None, options: dict[str, Any]) -> None:
    original = tanh_mlp()
    given = {"inner": "aot_eager", "min_speedup": 0, **options}
    compiled = torch.compile(copy.deepcopy(original), backend="dropfx", dynamic=dynamic, fullgraph=True, options=given)
    for rows in (4, 6, 9, 5):
        check(original, compiled, one_backward, torch.randn(rows, 48).double(), sites={"2", "5"})
    assert graphs() == {True: 1, False: 4, None: 2}[dynamic]


def test_features_that_vary_are_fixed_by_a_guard() -> None:
    """The units of a site may not vary: where nothing else says what they are, each count compiles anew."""

    class Widths(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return nn.functional.linear(nn.functional.dropout(x.tanh(), 0.5), weight)

    compiled = captured(Widths())
    for width in (48, 64, 80):
        with dropfx.testing.record() as masks:
            compiled(torch.randn(4, width), torch.randn(8, width))
        assert masks[0][":dropout_1"].shape == (width,)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_rate_that_changes(inner: str) -> None:
    """Each rate is compiled once, exactly; beyond Dynamo's limit the model runs as written."""
    original = tanh_mlp()
    compiled = captured(original, inner=inner)
    rates = (0.5, 0.25, 0.75, 0.5, 0.25)
    for rate in rates:
        for module in (original, compiled):
            module.get_submodule("2" if module is original else "_orig_mod.2").p = rate
        masks = check(original, compiled, one_backward, torch.randn(6, 48).double(), sites={"2", "5"})
        assert masks[0]["2"].max() == 1 / (1 - rate)
    assert counters["frames"]["ok"] == len(set(rates))


def test_rates_beyond_the_limit_of_recompilations_run_as_written() -> None:
    compiled = captured(tanh_mlp(), inner="eager")
    recorded = []
    with torch._dynamo.config.patch(recompile_limit=3):
        for step in range(5):
            compiled.get_submodule("_orig_mod.2").p = 0.3 + 0.1 * step
            with dropfx.testing.record() as masks:
                compiled(torch.randn(4, 48).double()).sum().backward()
            recorded.append(bool(masks))
    assert recorded == [True, True, True, False, False]


@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_rate_of_0_and_1(dynamic: bool | None) -> None:
    original = tanh_mlp()
    for rate in (0.0, 1.0):
        torch._dynamo.reset()
        compiled = torch.compile(
            copy.deepcopy(original), backend="dropfx", dynamic=dynamic, options={"inner": "eager", "min_speedup": 0}
        )
        for module in (original, compiled):
            module.get_submodule("2" if module is original else "_orig_mod.2").p = rate
        check(original, compiled, one_backward, torch.randn(6, 48).double(), sites={"5"})


def test_whole_graph_of_a_compiled_model_is_refused_with_the_reason() -> None:
    model = dropfx.compile(mlp(48, 96, 8), min_speedup=0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"dropfx\.compile has graphs of its own.*backend='dropfx'"):
        compiled(torch.randn(4, 48))
    compiled.eval()(torch.randn(4, 48))


class Between(nn.Module):
    """A compiled part between parts that Dynamo captures."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.part, self.after = nn.Linear(48, 48), mlp(48, 96, 48, activation=nn.Tanh), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.part(torch.tanh(self.before(x)))))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_compiled_part_of_a_captured_model() -> None:
    original = Between().double()
    model = copy.deepcopy(original)
    dropfx.compile(model.part, min_speedup=0)
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(4):
        with torch._dynamo.config.patch(error_on_recompile=step > 0), dropfx.testing.record() as masks:
            y = compiled(torch.randn(6, 48).double())
        y.sum().backward()
        assert set(masks[0]) == {"2"}
    assert graphs() == 3  # what comes before, the part, and what comes after
