"""Activation checkpoints in a captured graph: their bodies, and how they run where no compiler follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from dropfx.graph.nodes import copy_of

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def checkpoints(module: Any, graph: fx.Graph) -> list[tuple[fx.Node, fx.GraphModule]]:
    """The activation checkpoints of a graph and their bodies."""
    calls: Any = [n for n in graph.nodes if n.op == "call_function" and n.target is CHECKPOINT]
    uses = Counter(n.args[0].target for n in calls)
    # Dynamo gives each checkpoint a body of its own; one that were shared would need draws for each use
    return [(n, module.get_submodule(n.args[0].target)) for n in calls if uses[n.args[0].target] == 1]


def walk(module: fx.GraphModule) -> Iterator[tuple[fx.Node, dict[fx.Node, Any]]]:
    """All nodes in the order of the forward; with those of a body, what its inputs are in the graph around it."""

    def within(part: fx.GraphModule, operands: dict[fx.Node, Any]) -> Iterator[tuple[fx.Node, dict[fx.Node, Any]]]:
        bodies = dict(checkpoints(part, part.graph))
        for node in part.graph.nodes:
            if node in bodies:
                inputs = bodies[node].graph.find_nodes(op="placeholder")
                yield from within(bodies[node], {**operands, **dict(zip(inputs, node.args[1:], strict=False))})
            else:
                yield node, operands

    return within(module, {})


def without_gradients(module: fx.GraphModule) -> bool:
    """Whether a reentrant checkpoint is given no value that asks for a gradient.

    PyTorch then makes none, not of the parameters that it reads either, which a graph that calls its body would make.
    """
    graphs = (part.graph for part in module.modules() if isinstance(part, fx.GraphModule))
    calls = (node for graph in graphs for node in graph.nodes if node.target is CHECKPOINT)
    return any(node.kwargs.get("use_reentrant") is True and _asks_by_parameters_alone(node) for node in calls)


def _asks_by_parameters_alone(checkpoint: fx.Node) -> bool:
    results = pytree.tree_leaves(checkpoint.meta.get("example_value"))
    given = [operand.meta.get("example_value") for operand in checkpoint.all_input_nodes]
    asks = any(isinstance(value, Tensor) and value.requires_grad for value in results)
    return asks and not any(
        isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter) for value in given
    )


def runnable(module: fx.GraphModule) -> fx.GraphModule:
    """The module, or a copy whose checkpoints keep no activations: by itself the node only marks them for compilers."""
    if not checkpoints(module, module.graph):
        return module
    made = fx.GraphModule(module, copy_of(module.graph))
    made.meta.update(module.meta)
    for node, body in checkpoints(made, made.graph):
        setattr(made, str(node.args[0].target), runnable(body))  # type: ignore[union-attr]
        node.target = checkpointed
    made.recompile()
    return made


def checkpointed(body: fx.GraphModule, *args: Any, **options: Any) -> Any:
    """body(*args), run again in backward; a selective checkpoint's policy travels in the body's meta."""
    options.pop("use_reentrant", None)  # the other kind needs an input that asks for gradients
    if (policy := body.meta.get("_checkpoint_context_fn")) is not None:
        options["context_fn"] = policy
    return checkpoint(body, *args, use_reentrant=False, **options)
