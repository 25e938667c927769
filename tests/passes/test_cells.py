"""expand_cells and join_cells: fire where something is dropped, twice is once, whole again where nothing gained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from dropfx import ops
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.pass_infra import Context, run_passes
from dropfx.ops.recurrent.one_step import CELL_FUNCTIONS, cell_of_gates
from dropfx.options import make_options
from dropfx.passes import PIPELINE
from dropfx.passes.expand_cells import expand_cells
from dropfx.passes.join_cells import join_cells
from tests.capture import trace
from tests.catalogue import CASES
from tests.catalogue.cells import CELLS


def run(name: str, *passes: Any, **options: Any) -> list[Any]:
    """Targets of the graph."""
    model, (args, kwargs) = CASES[name].make(), CASES[name].call(4)
    context = Context(make_options(**{"min_speedup": 0, **options}), DEVICES["cpu"])
    graph: fx.Graph = run_passes(model, trace(model, args, kwargs), passes, context)
    return [node.target for node in graph.nodes]


def whole(targets: list[Any]) -> int:
    return sum(target in CELL_FUNCTIONS for target in targets if callable(target))


@pytest.mark.parametrize("name", CELLS)
def test_fires(name: str) -> None:
    targets = run(name, expand_cells)
    assert targets.count(cell_of_gates) == 3
    assert targets.count(F.linear) == 2 * 3 + 1
    assert not whole(targets)
    assert run(name, expand_cells, expand_cells) == targets


@pytest.mark.parametrize("name", CELLS)
def test_whole_again_where_nothing_gains(name: str) -> None:
    written = run(name)
    assert run(name, expand_cells, join_cells).count(F.linear) == written.count(F.linear)
    assert whole(run(name, *PIPELINE, min_speedup=1e9)) == 3


def test_gathered_steps_stay_apart() -> None:
    targets = run("lstm_cell", *PIPELINE)
    assert targets.count(cell_of_gates) == 3
    assert ops.linear_op in targets or any("linear" in str(target) for target in targets)


@pytest.mark.parametrize(
    ("name", "options"), [("cell_read_by_nothing_dropped", {}), ("lstm_cell", {"pattern": "tile"})]
)
def test_does_not_fire(name: str, options: dict[str, Any]) -> None:
    assert cell_of_gates not in run(name, expand_cells, **options)


@pytest.mark.parametrize("function", CELL_FUNCTIONS, ids=CELL_FUNCTIONS.values())
def test_one_step_is_pytorchs(function: Any) -> None:
    kind = CELL_FUNCTIONS[function]
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    torch.manual_seed(0)
    shapes = ((5, 7), (5, 6), (5, 6), (gates * 6, 7), (gates * 6, 6), (gates * 6,), (gates * 6,))
    x, h, c, *weights = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes)
    lstm = kind == "lstm"
    expected = function(x, (h, c) if lstm else h, *weights)
    w_ih, w_hh, b_ih, b_hh = weights
    made = cell_of_gates(kind, F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh), c if lstm else h)
    torch.testing.assert_close(made, expected)
    total, wanted = (sum(part.square().sum() for part in (y if lstm else (y,))) for y in (made, expected))
    used = [x, h, *weights, *([c] if lstm else [])]
    for ours, theirs in zip(torch.autograd.grad(total, used), torch.autograd.grad(wanted, used), strict=True):
        torch.testing.assert_close(ours, theirs)
