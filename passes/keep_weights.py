"""linear(x', W, rows, cols) -> linear(x', W, rows, cols, compact=kept_weight(W, rows, cols))

In graphs for compilers: the gathered weight becomes a value of its own, which forward saves for the gradient of the
input, so that backward gathers nothing. The eager function saves it by itself; Triton's products gather as they go.
"""

from __future__ import annotations

from torch import fx

from dropfx import ops
from dropfx.choice import forms_of
from dropfx.pass_infra import Context, PassResult


def keep_weights(module: fx.GraphModule, context: Context) -> PassResult:
    """Gather once what a product and the gradient of its input both read."""
    modified = False
    for node in [] if context.eager else list(module.graph.nodes):
        if node.target is not ops.linear_op or "compact" in node.kwargs or not _serves_twice(node, context):
            continue
        with module.graph.inserting_before(node):
            weight = module.graph.call_method("detach", (node.args[1],))  # its gradient is made by the product
            kept = module.graph.call_function(ops.kept_weight_op, (weight, *node.args[3:7]))
        node.kwargs = {**node.kwargs, "compact": kept}
        modified = True
    return PassResult(module, modified)


def _serves_twice(node: fx.Node, context: Context) -> bool:
    """Whether the input's gradient reads the kept weight too, and it is one copy: not one a group, nor a window.

    A window of a weight is a view on a CPU, and costs nothing.
    """
    x = node.args[0]
    sites = [context.sites[form.site] for form in forms_of(node) if form is not None]
    unread = isinstance(x, fx.Node) and not x.meta.get("asks_gradient", True)
    if unread or any(site.groups > 1 for site in sites):
        return False
    return any(s.device.type != "cpu" or s.realisation is None or s.realisation.count != 1 for s in sites)
