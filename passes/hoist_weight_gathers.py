"""linear(x', W, cols), linear(y', W, cols) -> V = s * W[:, cols];  linear(x', V), linear(y', V)

The steps of a loop that drop the same units multiply by the same kept weight: it is gathered once, and its gradient,
which adds up over the steps, is put back into the place of the whole weight's once.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.nn import functional as F

from dropfx import ops
from dropfx.graph.nodes import insert, matrix_of
from dropfx.graph.notes import forms_of, notes
from dropfx.graph.pass_infra import Context, PassResult


def hoist_weight_gathers(module: fx.GraphModule, context: Context) -> PassResult:
    """Gather once what several products read of a weight; not where kernels that gather as they go are asked for."""
    alike: dict[Any, list[fx.Node]] = {}
    for node in [] if context.options.lowering == "triton" else module.graph.nodes:
        if node.target is ops.linear_op and (key := _key(node, context)) is not None:
            alike.setdefault(key, []).append(node)
    several = [nodes for nodes in alike.values() if len(nodes) > 1]
    for nodes in several:
        _share(nodes)
    return PassResult(module, bool(several))


def _key(node: fx.Node, context: Context) -> Any:
    """What products must have in common; None where each group of rows has a kept weight of its own."""
    forms = forms_of(node)
    _, weight, bias, _, _, scale = ops.grouped(ops.linear_op, node.args)
    if any(form is not None and context.sites[form.site].groups > 1 for form in forms):
        return None
    if any(isinstance(given, fx.Node) and "pinned" in notes(given) for given in (weight, bias)):
        return None  # it may be written between the products
    # under another grad mode or autocast it would be another value
    return matrix_of(weight), forms, scale, notes(node).get("after_effects")


def _share(nodes: list[fx.Node]) -> None:
    graph = nodes[0].graph
    _, weight, _, rows, cols, scale = ops.grouped(ops.linear_op, nodes[0].args)
    biases: dict[Any, Any] = {}
    with graph.inserting_before(nodes[0]):
        kept = _gather(_gather(weight, rows, 0), cols, 1)
        if scale != 1.0:
            kept = insert(graph, ops.scale_units, (kept, scale, -1), like=kept)
    for node in nodes:
        x, _, bias, *_ = node.args
        with graph.inserting_before(node):
            if bias not in biases:
                biases[bias] = _gather(bias, rows, 0)
            product = insert(graph, F.linear, (x, kept, biases[bias]), like=node)
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def _gather(value: Any, kept: ops.Kept | None, dim: int) -> Any:
    if value is None or kept is None:
        return value
    return insert(value.graph, ops.gather_op, ops.flat(ops.gather_op, value, kept, dim), like=value)
