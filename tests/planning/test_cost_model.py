"""Prices against sums written out by hand, on a perceptron, with round figures for the device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from dropfx.graph.device_costs import DeviceCosts
from dropfx.graph.pass_infra import Context
from dropfx.options import make_options
from dropfx.passes.canonicalize import canonicalize
from dropfx.passes.find_sites import find_sites
from dropfx.passes.functionalize import functionalize
from dropfx.passes.plan_regions import plan_regions
from tests.capture import trace

COSTS = DeviceCosts(flops={4: 1e9, 8: 1e9, 2: 1e9}, bytes=1e9, random=1e8, launch=1e-6)
ROWS, IN, HIDDEN, OUT = 32, 64, 128, 16


def planned(costs: DeviceCosts, min_speedup: float = 0.0) -> Context:
    """The plan of Linear, ReLU, Dropout, Linear in float32."""
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.ReLU(), nn.Dropout(0.5), nn.Linear(HIDDEN, OUT))
    module = torch.fx.GraphModule(model, trace(model, (torch.randn(ROWS, IN),)))
    context = Context(make_options(min_speedup=min_speedup), costs)
    for step in (functionalize, canonicalize, find_sites, plan_regions):
        module, _ = step(module, context)
    return context


def product(m: int, n: int, k: int) -> float:
    return COSTS.launch + max(2 * m * n * k / 1e9, 4 * (m * k + k * n + m * n) / 1e9)


def moved(elements: float, passes: float) -> float:
    return COSTS.launch + 4 * elements * passes / 1e9


def by_hand(keep: float) -> float:
    """Seconds of the step where a share of the hidden units is kept: gathered weights are copied, gradients placed."""
    hidden = round(HIDDEN * keep)
    first, second = 2 * product(ROWS, hidden, IN), 3 * product(ROWS, OUT, hidden)
    relu = moved(ROWS * hidden, 4)
    if keep == 1:
        return first + second + relu + ROWS * HIDDEN / 1e8 + 2 * moved(ROWS * HIDDEN, 3)
    weights = [HIDDEN * IN, OUT * HIDDEN]
    copies = sum(2 * moved(keep * weight, 2) + moved(weight, 1) for weight in weights)
    return first + second + relu + copies + 2 * moved(ROWS * hidden, 2)


def test_a_step_as_written_and_as_planned() -> None:
    context = planned(COSTS)
    assert context.sites[0].rewritten
    assert context.seconds_written == pytest.approx(by_hand(1.0))
    assert context.seconds_planned == pytest.approx(by_hand(0.5))


def test_gathered_operations_and_draws_are_paid_for() -> None:
    context = planned(dataclasses.replace(COSTS, gathered=1e-3, draw=1e-2))
    assert context.seconds_written == pytest.approx(by_hand(1.0))
    assert context.seconds_planned == pytest.approx(by_hand(0.5) + 2 * 1e-3 + 1e-2)


@pytest.mark.parametrize("field", ["gathered", "draw"])
def test_a_site_that_does_not_pay_runs_as_written(field: str) -> None:
    costs = dataclasses.replace(COSTS, **{field: 1.0})
    (site,) = planned(costs, 1.05).sites
    assert not site.rewritten
    context = planned(costs, 1.05)
    assert context.seconds_planned == context.seconds_written == pytest.approx(by_hand(1.0))


def test_the_price_of_a_region_counts_them_once_each() -> None:
    """The predicted speed-up of the only site is that of all that it touches."""
    costs = dataclasses.replace(COSTS, gathered=1e-3, draw=1e-2)
    context = planned(costs)
    (site,) = context.sites
    assert site.predicted_speedup == pytest.approx(context.seconds_written / context.seconds_planned, rel=1e-4)
