"""Graphs built by hand, node by node, for tests of a single pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dropfx.graph.device_costs import DEVICES
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.options import make_options


class Built:
    """A graph whose nodes have their fake values; inputs are made as they are asked for.

    Attributes:
        graph: it.
        inputs: real values of its placeholders.
    """

    def __init__(self) -> None:
        self.graph, self.inputs = fx.Graph(), list[Tensor]()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def input(self, name: str, *shape: int, parameter: bool = False) -> fx.Node:
        """A placeholder of random numbers."""
        value = torch.randn(*shape, dtype=torch.float64)
        self.inputs.append(value)
        node = self.graph.placeholder(name)
        notes(node)["val"] = self._mode.from_tensor(value)
        if parameter:
            notes(node)["parameter"] = True
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A function, or the method of that name."""
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, target, args, kwargs)
        given, named = fx.node.map_arg((args, kwargs), lambda operand: notes(operand)["val"])
        with self._mode:
            value = getattr(given[0], target)(*given[1:], **named) if kind == "call_method" else target(*given, **named)
        notes(node)["val"] = value
        return node

    def module(self, *results: fx.Node) -> fx.GraphModule:
        """The graph module that returns these."""
        self.graph.output(results)
        return fx.GraphModule({}, self.graph)

    def run(self, module: fx.GraphModule) -> tuple[Tensor, ...]:
        """What it computes of the inputs, under one seed."""
        module.graph.lint()
        module.recompile()
        torch.manual_seed(0)
        return module(*self.inputs)


def context(**options: Any) -> Context:
    """As the pipeline begins."""
    return Context(make_options(min_speedup=0, **options), DEVICES["cpu"])


def names(module: fx.GraphModule) -> list[str]:
    """Targets of the calls, in order."""
    calls = (node for node in module.graph.nodes if node.op.startswith("call"))
    return [node.target if isinstance(node.target, str) else node.target.__name__ for node in calls]


def changed(result: PassResult) -> bool:
    """Whether a pass says that it changed its graph, which then is sound."""
    result.graph_module.graph.lint()
    return result.modified
