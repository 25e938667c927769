"""rewrite_recurrent on graphs built by hand: a recurrence is told what its dropped weight keeps."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from dropfx import ops
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.notes import Form, UnitAxis, notes
from dropfx.graph.pass_infra import Context
from dropfx.options import make_options
from dropfx.passes.rewrite_recurrent import rewrite_recurrent

NAMES = ("pre", "h0", "c0", "w_hh", "starts", "run")


def by_hand(dim: int | None, factor: int = 1) -> tuple[fx.GraphModule, Context, fx.Node]:
    """An LSTM of 16 units whose W_hh is planned to be read compact along `dim`."""
    graph = fx.Graph()
    pre, h0, c0, weight, starts, run = (graph.placeholder(name) for name in NAMES)
    node = graph.call_function(ops.recurrence_op, ("lstm", pre, h0, c0, weight, None, None, None, False))
    if dim is not None:
        notes(node)["reads"] = {weight: Form(0, UnitAxis(dim, factor))}
    graph.output(node)
    context = Context(make_options(), DEVICES["cpu"], draws={0: {"starts": starts, "run": run}})
    return fx.GraphModule({}, graph), context, node


@pytest.mark.parametrize(("dim", "place"), [(-2, 9), (-1, 11)])
def test_kept_rows_or_columns(dim: int, place: int) -> None:
    module, context, node = by_hand(dim)
    assert rewrite_recurrent(module, context).modified
    dense = 20 - place
    assert [str(argument) for argument in node.args[place : place + 2]] == ["starts", "run"]
    assert node.args[dense : dense + 2] == (None, 0)
    assert not rewrite_recurrent(module, context).modified


def test_it_computes_with_the_kept_columns() -> None:
    module, context, _ = by_hand(-1)
    rewrite_recurrent(module, context)
    module.recompile()
    torch.manual_seed(0)
    pre, h0, c0, weight = torch.randn(5, 3, 64), torch.randn(3, 16), torch.randn(3, 16), torch.randn(64, 16)
    starts = torch.tensor([0, 8])
    kept = torch.zeros(16).index_fill_(0, torch.tensor([0, 1, 2, 3, 8, 9, 10, 11]), 1)
    dense = ops.recurrence_op("lstm", pre, h0, c0, weight * kept, None, None, None, False)
    gathered = weight[:, kept.bool()].contiguous()
    torch.testing.assert_close(module(pre, h0, c0, gathered, starts, 4)[0], dense[0])


def test_what_the_plan_leaves() -> None:
    module, context, node = by_hand(None)
    assert not rewrite_recurrent(module, context).modified
    assert len(node.args) == 9


def test_positions_of_an_axis_with_several_a_unit() -> None:
    """Rows of W_hh by gates: each unit has a run of its own in every one of them."""
    module, context, node = by_hand(-2, factor=4)
    rewrite_recurrent(module, context)
    assert [argument.target.__name__ for argument in node.args[9:11]] == ["mul", "mul"]  # type: ignore[union-attr]
