"""linear(x', W, b, rows, cols) -> gathered_linear(x', W, gathered_weight(W, rows, cols), b, rows, cols)

In graphs for compilers: gathering the weight becomes a node of its own, whose value forward saves for the gradient of
the input, and the products become the compiler's own. The eager function saves it by itself; Triton's products gather
as they go.
"""

from __future__ import annotations

from torch import fx

from dropfx import ops
from dropfx.graph.notes import forms_of
from dropfx.graph.pass_infra import Context, PassResult


def keep_weights(module: fx.GraphModule, context: Context) -> PassResult:
    """Gather once what a product and the gradient of its input both read, and open the product to compilers."""
    modified = False
    for node in [] if context.eager else list(module.graph.nodes):
        if node.target is not ops.linear_op or not _one_copy(node, context):
            continue
        with module.graph.inserting_before(node):
            x, weight, *rest = node.args
            *_, rows, cols, _ = ops.grouped(ops.linear_op, node.args)
            detached = module.graph.call_method("detach", (weight,))  # its gradient is made by the product
            args = ops.flat(ops.gathered_weight_op, detached, rows, cols)
            kept = module.graph.call_function(ops.gathered_weight_op, args)
        node.target, node.args = ops.gathered_linear, (x, weight, kept, *rest)
        modified = True
    return PassResult(module, modified)


def _one_copy(node: fx.Node, context: Context) -> bool:
    """Whether the kept weight is one copy: not one a group, nor a window, which on a CPU is a free view."""
    sites = [context.sites[form.site] for form in forms_of(node) if form is not None]
    if any(site.groups > 1 for site in sites):
        return False
    return any(s.device.type != "cpu" or s.fit is None or s.fit.count != 1 for s in sites)
