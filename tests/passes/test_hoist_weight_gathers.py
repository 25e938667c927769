"""hoist_weight_gathers and fold_masks on graphs built by hand and on cells: what steps share is gathered once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dropfx import ops
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.nodes import is_parameter
from dropfx.graph.notes import Form, UnitAxis
from dropfx.graph.pass_infra import Context, Site, run_passes
from dropfx.options import make_options
from dropfx.passes import PIPELINE
from dropfx.passes.fold_masks import fold_masks
from dropfx.passes.hoist_weight_gathers import hoist_weight_gathers
from tests.capture import trace
from tests.catalogue import CASES
from tests.catalogue.cells import ONE_MASK

INPUTS = (torch.randn(3, 8), torch.randn(3, 8), torch.randn(16, 16), torch.randn(16), torch.tensor([0, 12]))
NAMES = ("x", "y", "weight", "bias", "starts")


def context(**options: Any) -> Context:
    made = make_options(min_speedup=0, **options)
    groups = made.groups if isinstance(made.groups, int) else 1
    return Context(made, DEVICES["cpu"], sites=[Site("drop", 0.5, groups=groups, fit=made.pattern.fit(16, 0.5))])


def products(rows: bool = False, scales: tuple[float, float] = (2.0, 2.0), **meta: Any) -> fx.GraphModule:
    """Two products with the kept columns (and rows) of one weight, whose node gets `meta`."""
    graph = fx.Graph()
    x, y, weight, bias, starts = (graph.placeholder(name) for name in NAMES)
    weight.meta = meta
    for operand, scale in zip((x, y), scales, strict=True):
        runs = (starts, 4, starts, 4) if rows else (None, 0, starts, 4)
        node = graph.call_function(ops.linear_op, (operand, weight, bias, *runs, scale, 0, 0))
        node.meta = {"reads": {operand: Form(0, UnitAxis(-1))}}
    graph.output(tuple(node for node in graph.nodes if node.target is ops.linear_op))
    return fx.GraphModule({}, graph)


def gradients(module: fx.GraphModule) -> list[Tensor]:
    module.graph.lint()
    module.recompile()
    leaves = [t.double().requires_grad_() for t in INPUTS[:4]]
    found = torch.cat(module(*leaves, INPUTS[4]))
    return [found, *torch.autograd.grad(found.sin().sum(), leaves)]


def targets(module: fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes]


@pytest.mark.parametrize("rows", [False, True])
def test_gathered_once(rows: bool) -> None:
    module = products(rows)
    expected = gradients(module)
    assert hoist_weight_gathers(module, context()).modified
    assert targets(module).count(F.linear) == 2
    assert targets(module).count(ops.gather_op) == (3 if rows else 1)  # of rows the bias too
    assert targets(module).count(ops.scale_units) == 1
    for got, want in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert not hoist_weight_gathers(module, context()).modified


@pytest.mark.parametrize(
    ("made", "options"),
    [
        pytest.param({"scales": (2.0, 1.0)}, {}, id="scaled apart"),
        pytest.param({"pinned": True}, {}, id="a weight that is written"),
        pytest.param({}, {"groups": 2}, id="a kept weight a group"),
        pytest.param({}, {"lowering": "triton"}, id="kernels that gather as they go"),
    ],
)
def test_refuses(made: dict[str, Any], options: dict[str, Any]) -> None:
    module = products(**made)
    assert not hoist_weight_gathers(module, context(**options)).modified
    assert targets(module).count(ops.linear_op) == 2


def multiplied(ones: str = "ones", **meta: Any) -> tuple[fx.GraphModule, Context]:
    """gather(x) * (gather(ones) * scale)"""
    graph = fx.Graph()
    x, starts, scale = (graph.placeholder(name) for name in ("x", "starts", "scale"))
    x.meta = {"val": torch.empty(3, 16)}
    made = graph.call_function(getattr(torch, ones), ((3, 16),) if ones == "ones" else (x,))
    form = Form(0, UnitAxis(-1))
    kept = [graph.call_function(ops.gather_op, (value, starts, 4, -1, 0)) for value in (x, made)]
    mask = graph.call_function(ops.scale_units, (kept[1], scale, -1))
    product = graph.call_function(torch.mul, (kept[0], mask))
    for node in (*kept, mask, product):
        node.meta = {"val": torch.empty(3, 16), "form": form}
    mask.meta["val"] = torch.empty(3, 16)
    kept[0].meta |= meta
    graph.output(product)
    prepared = context()
    prepared.draws[0] = {"scale": scale}
    return fx.GraphModule({}, graph), prepared


@pytest.mark.parametrize("ones", ["ones", "ones_like"])
def test_a_mask_of_ones_is_its_scale(ones: str) -> None:
    module, prepared = multiplied(ones)
    x, starts = torch.randn(3, 16), torch.tensor([0, 12])
    expected = module(x, starts, 2.0)
    assert fold_masks(module, prepared).modified
    assert torch.mul not in targets(module)
    module.recompile()
    assert torch.equal(module(x, starts, 2.0), expected)
    assert not fold_masks(module, prepared).modified


@pytest.mark.parametrize(
    ("ones", "meta"),
    [
        pytest.param("zeros_like", {}, id="other values"),
        pytest.param("ones", {"form": None}, id="another form"),
        pytest.param("ones", {"val": torch.empty(3, 16, dtype=torch.bfloat16)}, id="promoted"),
        pytest.param("ones", {"val": torch.empty(1, 16)}, id="broadcast by the mask"),
    ],
)
def test_a_mask_that_does_more_stays(ones: str, meta: dict[str, Any]) -> None:
    module, prepared = multiplied(ones, **meta)
    assert not fold_masks(module, prepared).modified


@pytest.mark.parametrize(
    ("name", "pattern"), [*((name, "block") for name in ONE_MASK), ("everywhere", "slice"), ("everywhere", "row")]
)
def test_each_weight_of_a_loop_is_gathered_once(name: str, pattern: str) -> None:
    """Of any number of steps; what each step takes is its own values, and nothing is left of the masks."""
    case = CASES[f"one_mask_{name}"]
    model, (args, kwargs) = case.make(), case.call(4)
    prepared = Context(make_options(min_speedup=0, pattern=pattern), DEVICES["cpu"])
    graph = run_passes(model, trace(model, args, kwargs), PIPELINE, prepared)
    gather = ops.EAGER[ops.gather_op]
    weights = [n.args[0].target for n in graph.nodes if n.target is gather and is_parameter(n.args[0])]
    assert len(weights) == len(set(weights))
    gathered = {"input": "ih", "state": "hh"} if name[:3] != "own" else {"input": "of_input", "state": "of_state"}
    assert len(weights) == sum(place in gathered for place in ONE_MASK[name][1].split())
    assert not any(part in str(node.target) for node in graph.nodes for part in ("bernoulli", "dropout"))
    assert torch.ones not in [node.target for node in graph.nodes]
