"""fuse_activation on graphs built by hand: fires, its arguments, each refusal, twice is once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dropfx import ops
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.pass_infra import Context
from dropfx.ops.triton_ops import FROM_OUTPUT, KERNELS, activated_linear_op
from dropfx.options import make_options
from dropfx.passes.fuse_activation import fuse_activation
from dropfx.passes.lower import lower

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def graph_of(activation: Callable[[fx.Node], Any], lowering: str = "triton") -> tuple[fx.GraphModule, list[Tensor]]:
    """activation(linear(x, W, b, starts)) by Triton, and its inputs."""
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, device=DEVICE) for shape in ((3, 4), (16, 4), (16,))]
    inputs.append(torch.tensor([0, 8], device=DEVICE))
    graph = fx.Graph()
    x, weight, bias, starts = (graph.placeholder(name) for name in ("x", "weight", "bias", "starts"))
    linear = graph.call_function(ops.linear_op, (x, weight, bias, starts, 4, None, 0, 0.5))
    graph.output(activation(linear))
    module = fx.GraphModule({}, graph)
    context = Context(make_options(lowering=lowering, min_speedup=0), DEVICES["cpu"])
    lower(module, context)
    return module, inputs


def run(module: fx.GraphModule) -> bool:
    return fuse_activation(module, Context(make_options(), DEVICES["cpu"])).modified


def call(function: Any, **kwargs: Any) -> Callable[[fx.Node], fx.Node]:
    return lambda node: node.graph.call_function(function, (node,), kwargs)


@pytest.mark.parametrize("function", [F.relu, torch.relu, torch.tanh])
def test_fires(function: Any) -> None:
    module, inputs = graph_of(call(function))
    module.recompile()
    expected = module(*inputs)
    before = next(n for n in module.graph.nodes if n.target is KERNELS[ops.linear_op]).args
    assert run(module)
    (fused,) = (n for n in module.graph.nodes if n.op == "call_function")
    assert fused.target is activated_linear_op
    *told, name = ops.grouped(activated_linear_op, fused.args)
    assert (told, name) == (ops.grouped(ops.linear_op, before), function.__name__)
    module.recompile()
    torch.testing.assert_close(module(*inputs), expected)
    assert not run(module), "a second run finds nothing"


def test_method_spelling() -> None:
    module, _ = graph_of(lambda node: node.graph.call_method("relu", (node,)))
    assert run(module)


def two_readers(node: fx.Node) -> Any:
    return node.graph.call_function(F.relu, (node,)), node


def in_place(node: fx.Node) -> Any:
    return node.graph.call_function(F.relu, (node,), {"inplace": True})


def other_mode(node: fx.Node) -> Any:
    reader = node.graph.call_function(F.relu, (node,))
    node.meta["after_effects"], reader.meta["after_effects"] = 0, 1
    return reader


def pinned(node: fx.Node) -> Any:
    node.meta["pinned"] = True
    return node.graph.call_function(F.relu, (node,))


@pytest.mark.parametrize(
    "activation",
    [call(F.gelu), call(F.silu), call(torch.sigmoid), two_readers, in_place, other_mode, pinned, lambda node: node],
    ids=["gelu", "silu", "sigmoid", "two readers", "in place", "other mode", "pinned", "none"],
)
def test_left_alone(activation: Callable[[fx.Node], Any]) -> None:
    """gelu and silu need what they were given in backward."""
    module, _ = graph_of(activation)
    assert not run(module)


def test_products_by_aten_are_left_alone() -> None:
    module, _ = graph_of(call(F.relu), lowering="aten")
    assert not run(module)


@pytest.mark.parametrize("name", FROM_OUTPUT)
def test_gradient_from_the_output_is_autograds(name: str) -> None:
    function, gradient = FROM_OUTPUT[name]
    x = torch.tensor([-3.0, -1e-3, -0.0, 0.0, 1e-3, 0.7, float("nan")], requires_grad=True)
    y = function(x)
    dy = torch.linspace(1, 2, len(x))
    (expected,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(gradient(dy, y), expected) or torch.allclose(gradient(dy, y), expected, equal_nan=True)
