"""view(x, B, n) -> view(x', B, width): a view of a compact value names the kept width, not the dense one."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from dropfx.graph.nodes import op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult

_SIZES_AFTER = {"view": 1, "reshape": 1, "unflatten": 2}
"""Views that name sizes -> position of the first."""


def rewrite_views(module: fx.GraphModule, context: Context) -> PassResult:
    """Rewrite the sizes of the views that the plan made compact."""
    modified = False
    for node in list(module.graph.nodes):
        if "form" in notes(node) and op_name(node) == "view_as":
            modified |= _sizes_of_model(node)
        if "form" in notes(node) and op_name(node) in _SIZES_AFTER:
            modified |= _rename(node, context)
    return PassResult(module, modified)


def _sizes_of_model(node: fx.Node) -> bool:
    """view_as(x, model) -> view(x, *sizes of model): the model keeps its dense shape."""
    model, value = node.args[1], value_of(node)
    assert value is not None
    with node.graph.inserting_before(node):
        sizes = [node.graph.call_method("size", (model, d)) for d in range(value.dim())]
    node.target, node.args = "view", (node.args[0], *sizes)
    return True


def _rename(node: fx.Node, context: Context) -> bool:
    value, form = value_of(node), notes(node)["form"]
    assert value is not None
    first = _SIZES_AFTER[op_name(node)]
    sizes: list[Any] = list(node.args[first:])
    nested = len(sizes) == 1 and isinstance(sizes[0], (tuple, list))
    sizes = list(sizes[0]) if nested else sizes
    place = len(sizes) + form.axis.dim
    if op_name(node) == "unflatten":
        split = node.args[1]
        assert isinstance(split, int)
        source = value_of(node.args[0])
        assert source is not None
        place = value.dim() + form.axis.dim - split % source.dim()
    if not 0 <= place < len(sizes) or sizes[place] == -1:
        return False
    sizes[place] = _width(node, form, context)
    node.args = (*node.args[:first], tuple(sizes)) if nested else (*node.args[:first], *sizes)
    return True


def _width(node: fx.Node, form: Any, context: Context) -> fx.Node:
    width = context.draws[form.site]["width"]
    if form.axis.factor == 1:
        return width
    with node.graph.inserting_before(node):
        return node.graph.call_function(operator.mul, (width, form.axis.factor))
