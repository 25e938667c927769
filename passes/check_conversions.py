"""Where DROPFX_CHECK=1: after rewrite_sites every node reads its operands in the forms that the plan gave it."""

from __future__ import annotations

from torch import fx

from dropfx import ops
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult, checking


def check_conversions(module: fx.GraphModule, context: Context) -> PassResult:
    """Raise where a node is given another form than it reads."""
    for node in module.graph.nodes if checking() else ():
        if node.target in (ops.gather_op, ops.scatter_op, ops.spread_rows):  # the conversions themselves
            continue
        wanted = set(notes(node).get("reads", {}).values())
        given = {form for operand in node.all_input_nodes if (form := notes(operand).get("form")) is not None}
        assert wanted == given, f"{node} is given {given}, and reads {wanted}"
    return PassResult(module, False)
