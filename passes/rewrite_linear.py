"""linear(x', W, b) -> x' @ W[rows][:, cols]^T + b[rows]        where x' or the output is compact."""

from __future__ import annotations

from torch import fx

from dropfx import ops
from dropfx.graph.nodes import argument, insert, op_name
from dropfx.graph.notes import forms_of, notes
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.passes.rewrite_sites import kept_of


def rewrite_linear(module: fx.GraphModule, context: Context) -> PassResult:
    """Replace the Linears that the plan made producers, consumers or both."""
    modified = False
    for node in list(module.graph.nodes):
        if op_name(node) != "linear" or not ("form" in notes(node) or "reads" in notes(node)):
            continue
        graph = node.graph
        with graph.inserting_before(node):
            x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
            cols, rows = (None if form is None else kept_of(graph, form, context) for form in forms_of(node))
            args = ops.flat(ops.linear_op, x, weight, argument(node, 2, "bias"), rows, cols, 1.0)
            new = insert(graph, ops.linear_op, args, like=node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        modified = True
    return PassResult(module, modified)
