"""view(x, B, n) -> view(x', B, width): a view of a compact value names the kept width, not the dense one."""

from __future__ import annotations

import operator

from torch import fx

from dropfx.graph.nodes import op_name
from dropfx.graph.notes import Form, notes
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.graph.view_sizes import name_size, names_size, sizes_of_model

_NAMING = ("view", "reshape", "unflatten")


def rewrite_views(module: fx.GraphModule, context: Context) -> PassResult:
    """Rewrite the sizes of the views that the plan made compact."""
    modified = False
    for node in list(module.graph.nodes):
        if (form := notes(node).get("form")) is None:
            continue
        if op_name(node) == "view_as":
            sizes_of_model(node)
            modified = True
        if op_name(node) in _NAMING and names_size(node, form.axis.dim):
            name_size(node, form.axis.dim, kept_width(node, form, context))
            modified = True
    return PassResult(module, modified)


def kept_width(node: fx.Node, form: Form, context: Context) -> fx.Node:
    """The positions that a form keeps of its axis, as a node before `node`."""
    width = context.draws[form.site]["width"]
    if form.axis.factor == 1:
        return width
    with node.graph.inserting_before(node):
        return node.graph.call_function(operator.mul, (width, form.axis.factor))
