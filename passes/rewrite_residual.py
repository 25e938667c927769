"""base + y -> residual_add(base, y'): the kept units are added into a copy of the base, the others copied."""

from __future__ import annotations

import operator

from torch import fx

from dropfx import ops
from dropfx.graph.nodes import insert, op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.op_families import SUMS
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.passes.rewrite_sites import kept_of


def rewrite_residual(module: fx.GraphModule, context: Context) -> PassResult:
    """Replace the sums that the plan made consumers (they read compact and emit dense)."""
    modified = False
    for node in list(module.graph.nodes):
        if op_name(node) not in SUMS or "reads" not in notes(node) or "form" in notes(node):
            continue
        _rewrite(node, context)
        modified = True
    return PassResult(module, modified)


def _rewrite(node: fx.Node, context: Context) -> None:
    graph = node.graph
    (form,) = notes(node)["reads"].values()
    alpha = node.kwargs.get("alpha", 1)
    first, second = node.args
    compact_first = isinstance(first, fx.Node) and notes(first).get("form") == form
    value = value_of(node)
    assert value is not None
    assert isinstance(alpha, (int, float))
    with graph.inserting_before(node):
        base, branch = (second, first) if compact_first else (first, second)
        scale = 1.0 if compact_first else float(alpha if op_name(node) == "add" else -alpha)
        if compact_first and alpha != 1:
            base = insert(graph, operator.mul, (base, alpha), like=node)
        units = value.shape[form.axis.dim]
        kept = kept_of(graph, form, context)
        args = ops.flat(ops.residual_add_op, base, branch, kept, form.axis.dim, units, scale)
        new = insert(graph, ops.residual_add_op, args, like=node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
