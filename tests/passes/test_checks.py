"""The checks between passes, on plans and graphs that are wrong in one place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from dropfx.errors import PassError
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.notes import Form, UnitAxis, notes
from dropfx.graph.pass_infra import Context, PassResult, run_passes
from dropfx.options import make_options
from dropfx.passes import PIPELINE
from tests.capture import symbolic


def run(fault: Callable[[fx.Graph, Context], None], behind: str) -> None:
    """The pipeline on a small perceptron, with a fault put in behind a pass."""
    layers = nn.Linear(32, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 8)
    model = nn.Sequential(*layers)
    graph = symbolic(model, (torch.randn(4, 32),))
    context = Context(make_options(min_speedup=0), DEVICES["cpu"])

    def put(module: fx.GraphModule, context: Context) -> PassResult:
        fault(module.graph, context)
        return PassResult(module, False)

    place = [step.__name__ for step in PIPELINE].index(behind) + 1
    run_passes(model, graph, (*PIPELINE[:place], put, *PIPELINE[place:]), context)


def compact(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if "form" in notes(node))


def another_axis(graph: fx.Graph, context: Context) -> None:
    notes(compact(graph))["form"] = Form(0, UnitAxis(-2))


def no_operand(graph: fx.Graph, context: Context) -> None:
    notes(compact(graph))["reads"] = {graph.output_node(): Form(0, UnitAxis(-1))}


def written_to(graph: fx.Graph, context: Context) -> None:
    notes(compact(graph))["pinned"] = True


def refused(graph: fx.Graph, context: Context) -> None:
    context.sites[0].reason = "for a test"


def read_dense(graph: fx.Graph, context: Context) -> None:
    reader = next(node for node in graph.nodes if notes(node).get("reads"))
    notes(reader)["reads"] = {}


def nobody_reads(graph: fx.Graph, context: Context) -> None:
    for node in context.draws[0].values():
        node.replace_all_uses_with(next(iter(graph.nodes)))


@pytest.mark.parametrize(
    ("fault", "behind", "message"),
    [
        (another_axis, "plan_tiles", "places on"),
        (no_operand, "plan_tiles", "no operand of it"),
        (written_to, "plan_tiles", "its memory is written to"),
        (refused, "plan_tiles", "runs as written: for a test"),
        (read_dense, "rewrite_sites", "is given"),
        (nobody_reads, "fuse_activation", "nothing reads the draw"),
    ],
)
def test_fault_is_found(fault: Callable[[fx.Graph, Context], None], behind: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        run(fault, behind)


def test_nothing_is_checked_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DROPFX_CHECK")
    run(read_dense, "rewrite_sites")
