"""recurrence(pre, h, c, W') -> recurrence(pre, h, c, W', rows, cols)    where W_hh is compact on rows or columns."""

from __future__ import annotations

from torch import fx

from dropfx import ops
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.passes.rewrite_sites import kept_of


def rewrite_recurrent(module: fx.GraphModule, context: Context) -> PassResult:
    """Tell the recurrences of dropped weights what these keep."""
    modified = False
    for node in module.graph.find_nodes(op="call_function", target=ops.recurrence_op):
        forms = list(notes(node).get("reads", {}).values())
        *given, rows, cols = ops.grouped(ops.recurrence_op, node.args)
        if not forms or rows is not None or cols is not None:
            continue
        (form,) = forms
        with module.graph.inserting_before(node):
            kept = kept_of(module.graph, form, context)
        rows, cols = (kept, None) if form.axis.dim == -2 else (None, kept)
        node.args = ops.flat(ops.recurrence_op, *given, rows, cols)
        modified = True
    return PassResult(module, modified)
