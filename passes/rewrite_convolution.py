"""conv(x', W, b) -> conv(x', W[rows][:, cols], b[rows])        where x' or the output is compact

With several draws the rows of each are a convolution of their own. Depthwise ones, whose plan has the filters of kept
channels gathered, are as many groups as these.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from dropfx import ops
from dropfx.graph.layers import depthwise
from dropfx.graph.nodes import argument, memory_order, op_name, value_of
from dropfx.graph.notes import forms_of, notes
from dropfx.graph.op_families import CONVOLUTIONS
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.passes.rewrite_sites import kept_of, move
from dropfx.passes.rewrite_views import kept_width

_GROUPS = 6
"""Place of a convolution's own `groups` among its arguments."""


def rewrite_convolution(module: fx.GraphModule, context: Context) -> PassResult:
    """Replace the convolutions that the plan made producers, consumers or both."""
    modified = False
    for node in list(module.graph.nodes):
        if op_name(node) not in CONVOLUTIONS or not ("form" in notes(node) or "reads" in notes(node)):
            continue
        if depthwise(node):
            _count_filters(node, kept_width(node, notes(node)["form"], context))
        else:
            _gather(node, context)
        modified = True
    return PassResult(module, modified)


def _count_filters(node: fx.Node, width: fx.Node) -> None:
    if len(node.args) > _GROUPS:
        node.args = (*node.args[:_GROUPS], width, *node.args[_GROUPS + 1 :])
    else:
        node.kwargs = {**node.kwargs, "groups": width}


def _gather(node: fx.Node, context: Context) -> None:
    graph, forms = node.graph, forms_of(node)
    groups = max(context.sites[form.site].groups for form in forms if form is not None)
    with graph.inserting_before(node):
        cols, rows = (None if form is None else kept_of(graph, form, context) for form in forms)
        x = argument(node, 0, "input")
        if groups == 1:
            made = _product(node, x, rows, cols)
        else:
            parts = graph.call_function(torch.tensor_split, (x, groups))
            made = _joined(graph, node, [_part(node, parts, k, rows, cols) for k in range(groups)])
    made.meta = {name: note for name, note in node.meta.items() if name not in ("form", "reads")}
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _joined(graph: fx.Graph, node: fx.Node, parts: list[fx.Node]) -> fx.Node:
    """The groups' rows in one, as the model's value lies in memory: of groups without rows PyTorch takes the layout."""
    value = value_of(node)
    assert value is not None
    order = memory_order(value)
    if order == tuple(sorted(order)) or order[0] != 0:
        return graph.call_function(torch.cat, (parts,))
    laid = [graph.call_method("permute", (part, *order)) for part in parts]
    made = graph.call_function(torch.cat, (laid,))
    return graph.call_method("permute", (made, *map(order.index, range(len(order)))))


def _part(node: fx.Node, parts: fx.Node, k: int, rows: Any, cols: Any) -> fx.Node:
    """The product of the rows of group k."""
    own = [None if kept is None else _of_group(node.graph, kept, k) for kept in (rows, cols)]
    return _product(node, node.graph.call_function(operator.getitem, (parts, k)), *own)


def _of_group(graph: fx.Graph, kept: ops.Kept, k: int) -> ops.Kept:
    """What group k keeps; one draw of all groups is that of each."""
    if isinstance(kept.leading, int) and kept.leading == 0:
        return kept
    starts: Any = graph.call_function(torch.select, (kept.starts, 0, k))
    return ops.Kept(starts, kept.run)


def _product(node: fx.Node, x: fx.Node, rows: ops.Kept | None, cols: ops.Kept | None) -> fx.Node:
    """The convolution of x by the kept part of the weight."""
    graph, weight, bias = node.graph, argument(node, 1, "weight"), argument(node, 2, "bias")
    value = value_of(weight)
    assert value is not None
    for kept, dim in ((rows, -value.dim()), (cols, 1 - value.dim())):
        if kept is not None:
            weight = move(graph, ops.gather_op, weight, kept, dim, value)
            weight.meta = {"val": value}
    if rows is not None and bias is not None:
        bias = move(graph, ops.gather_op, bias, rows, -1, value_of(bias))
    rest = {name: given for name, given in node.kwargs.items() if name not in ("input", "weight", "bias")}
    made = graph.call_function(node.target, (x, weight, bias, *node.args[3:]), rest)  # type: ignore[arg-type]
    made.meta = {"val": notes(node)["val"], "after_effects": notes(node).get("after_effects", 0)}
    return made
