"""recognise_row_masks: fires on masks of rows of recurrent weights, what is another value, twice is once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dropfx.graph.device_costs import DEVICES
from dropfx.graph.pass_infra import Context, run_passes
from dropfx.options import make_options
from dropfx.passes import functionalize, recognise_row_masks
from tests.capture import trace

Mask = Callable[[Tensor], Tensor]


class Dropped(nn.Module):
    """A plain RNN whose recurrent weight is what `weight` makes of it."""

    def __init__(self, weight: Mask) -> None:
        super().__init__()
        self.rnn, self.weight = nn.RNN(8, 8), weight
        self.raw = nn.Parameter(self.rnn.weight_hh_l0.data)
        del self.rnn.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.weight_hh_l0 = self.weight(self.raw)
        return self.rnn(x)[0]


def run(weight: Mask, passes: tuple[Any, ...] = (functionalize, recognise_row_masks)) -> fx.Graph:
    model = Dropped(weight)
    context = Context(make_options(), DEVICES["cpu"])
    return run_passes(model, trace(model, (torch.randn(5, 3, 8),), {}), passes, context)


def expanded(w: Tensor) -> Tensor:
    return F.dropout(torch.ones(w.size(0), 1), 0.25).expand_as(w) * w


def broadcast(w: Tensor) -> Tensor:
    return w * F.dropout(torch.ones(8, 1), 0.25, training=True)


def new_ones(w: Tensor) -> Tensor:
    return F.dropout(w.new_ones(8, 1), 0.25).expand(-1, 8) * w


@pytest.mark.parametrize("weight", [expanded, broadcast, new_ones])
def test_fires(weight: Mask) -> None:
    graph = run(weight)
    targets = [node.target for node in graph.nodes]
    assert F.dropout1d in targets
    assert not {F.dropout, torch.ones, "expand_as", "expand", "new_ones"} & set(targets)
    (site,) = (node for node in graph.nodes if node.target is F.dropout1d)
    assert site.args[1:] == (0.25, True)
    assert site.meta["site"].call.name == ":dropout_1"
    again = run(weight, (functionalize, recognise_row_masks, recognise_row_masks))
    assert [node.target for node in again.nodes] == targets


def columns(w: Tensor) -> Tensor:
    return F.dropout(torch.ones(1, 8), 0.25) * w


def elements(w: Tensor) -> Tensor:
    return F.dropout(torch.ones(8, 8), 0.25) * w


def of_others(w: Tensor) -> Tensor:
    return F.dropout(torch.rand(8, 1), 0.25) * w


def read_twice(w: Tensor) -> Tensor:
    mask = F.dropout(torch.ones(8, 1), 0.25)
    return mask * (w + mask)


def written(w: Tensor) -> Tensor:
    ones = torch.ones(8, 1)
    ones[0] = 2.0
    return F.dropout(ones, 0.25) * w


def off(w: Tensor) -> Tensor:
    return F.dropout(torch.ones(8, 1), 0.25, training=False) * w


def other_dtype(w: Tensor) -> Tensor:
    return F.dropout(torch.ones(8, 1, dtype=torch.bfloat16), 0.25) * w


def not_the_weight(w: Tensor) -> Tensor:
    return 1.0 * (F.dropout(torch.ones(8, 1), 0.25) * w)


OTHERS = [columns, elements, of_others, read_twice, written, off, other_dtype, not_the_weight]


@pytest.mark.parametrize("weight", OTHERS)
def test_other_values_stay(weight: Mask) -> None:
    assert F.dropout1d not in [node.target for node in run(weight).nodes]


def test_as_written_the_same_random_rows_are_dropped() -> None:
    w = torch.randn(64, 8)
    torch.manual_seed(0)
    expected = F.dropout(torch.ones(64, 1), 0.25).expand_as(w) * w
    torch.manual_seed(0)
    torch.testing.assert_close(F.dropout1d(w, 0.25), expected)
