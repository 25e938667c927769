"""What Dynamo captures of a module, in the form that passes take."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from dropfx.frontend.checkpoints import walk
from dropfx.frontend.dynamo_graph import prepare
from dropfx.frontend.fx_graph import functions
from dropfx.frontend.naming import Naming
from dropfx.frontend.whole_calls import unfold, whole_calls
from dropfx.graph.nodes import copy_of


def symbolic(model: nn.Module, args: tuple[Any, ...]) -> fx.Graph:
    """What torch.fx traces of a training call, its result a tuple: sizes stay what they are asked of."""
    graph = functions(model, args)
    graph.output_node().args = (tuple(pytree.tree_leaves(graph.output_node().args[0])),)
    return graph


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Graph:
    """The one graph of a training call."""
    found: list[fx.Graph] = []

    def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        unfold(module.graph)
        module.recompile()
        naming = Naming([node for node, _ in walk(module)])
        found.append(copy_of(module.graph))
        prepare(module.graph, found[-1], naming, {}, by_step=False)
        return module.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True), whole_calls:
        torch._dynamo.optimize(backend, nopython=True)(lambda: model(*args, **(kwargs or {})))()
    (graph,) = found
    return graph
