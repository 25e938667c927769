"""keep_weights on graphs built by hand: what is gathered for forward and backward is gathered once."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from dropfx import ops
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.notes import Form, UnitAxis
from dropfx.graph.pass_infra import Context, Site
from dropfx.options import make_options
from dropfx.passes.keep_weights import keep_weights

INPUTS = (torch.randn(3, 8), torch.randn(16, 16), torch.randn(16), torch.tensor([0, 12]))


def graph_of() -> tuple[fx.GraphModule, fx.Node]:
    """linear(x', W[:, cols], b), and its node."""
    graph = fx.Graph()
    x, weight, bias, starts = (graph.placeholder(name) for name in ("x", "weight", "bias", "starts"))
    node = graph.call_function(ops.linear_op, (x, weight, bias, None, 0, starts, 4, 2.0, 0, 0))
    node.meta = {"reads": {x: Form(0, UnitAxis(-1))}}
    graph.output(node)
    return fx.GraphModule({}, graph), node


def context(eager: bool = False, device: str = "cpu", **options: Any) -> Context:
    made = make_options(min_speedup=0, **options)
    groups = made.groups if isinstance(made.groups, int) else 1
    fit = made.pattern.fit(16, 0.5, groups)
    site = Site("drop", 0.5, groups=groups, fit=fit, device=torch.device(device))
    return Context(made, DEVICES["cpu"], eager=eager, sites=[site])


def gradients(module: fx.GraphModule) -> list[Tensor]:
    module.recompile()
    leaves = [t.clone().requires_grad_() for t in INPUTS[:3]]
    y = module(*leaves, INPUTS[3])
    return [y, *torch.autograd.grad(y.sin().sum(), leaves)]


def test_fires() -> None:
    module, node = graph_of()
    expected = gradients(module)
    before = node.args
    assert keep_weights(module, context()).modified
    assert node.target is ops.gathered_linear
    kept = node.args[2]
    assert kept.target is ops.gathered_weight_op
    assert kept.args[0].target == "detach"
    assert kept.args[0].args == (before[1],)
    assert ops.grouped(ops.gathered_weight_op, kept.args)[1:3] == ops.grouped(ops.linear_op, before)[3:5]
    assert node.args == (*before[:2], kept, *before[2:])
    for got, want in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"eager": True}, id="the eager function keeps it by itself"),
        pytest.param({"groups": 2}, id="a kept weight a group"),
        pytest.param({"pattern": "slice"}, id="a window is a view"),
    ],
)
def test_refuses(options: dict[str, Any]) -> None:
    module, node = graph_of()
    assert not keep_weights(module, context(**options)).modified
    assert node.target is ops.linear_op


@pytest.mark.parametrize("options", [{"pattern": "slice", "device": "cuda"}, {"pattern": "row"}, {"block": 5}], ids=str)
def test_what_is_copied_is_kept(options: dict[str, Any]) -> None:
    """A GPU copies windows too: it cannot ask where they begin."""
    module, _ = graph_of()
    assert keep_weights(module, context(**options)).modified


def test_products_that_were_lowered_are_left() -> None:
    module, node = graph_of()
    node.target = ops.EAGER[ops.linear_op]
    assert not keep_weights(module, context()).modified


def test_second_run_changes_nothing() -> None:
    module, _ = graph_of()
    keep_weights(module, context())
    assert not keep_weights(module, context()).modified
