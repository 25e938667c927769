"""dropout(x) -> dropout(x in the layout that the model gives it)        for the dropouts that run as written

PyTorch draws a mask in the order in which the tensor lies in memory. A site that runs as written draws what it would in
the model, under the same seed, though its neighbours were turned or made compact.
"""

from __future__ import annotations

from torch import fx

from dropfx.graph.axis_rules import rule_of
from dropfx.graph.nodes import argument, op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult

_DRAWING = ("dropout", "alpha_dropout", "rand_like", "randn_like", "randint_like", "bernoulli", "poisson", "rrelu")
"""Operations that draw a number for each element of their input; those of whole channels draw in the axes' order."""

_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like")
"""Operations whose result lies as their input does, and may be drawn into."""


_OWN_LAYOUT = ("batch_norm", "max_pool1d")
"""Operations of whose layout fake tensors say what PyTorch does not do (2.13, CPU)."""


def keep_layouts(module: fx.GraphModule, context: Context) -> PassResult:
    """Bring what such operations read into the layout that it had in the trace, where anything was rewritten."""
    modified = False
    for node in list(module.graph.nodes) if context.draws else []:
        source = argument(node, 0, "input")
        if not isinstance(source, fx.Node) or op_name(node) not in (*_DRAWING, *_LIKE):
            continue
        if op_name(node) in _LIKE or "pinned" not in notes(node):
            modified |= _settle(node, source)
    return PassResult(module, modified)


def _settle(node: fx.Node, source: fx.Node) -> bool:
    """Let the source lie as it does in the model; where that is not known, what it is made of."""
    deciding = _own_layouts(source)
    if not deciding:
        return _keep(node, source)
    inputs = [(other, argument(other, 0, "input")) for other in deciding]
    kept = [_keep(other, given) for other, given in inputs if isinstance(given, fx.Node)]
    return any(kept)


def _own_layouts(source: fx.Node) -> list[fx.Node]:
    """The operations with a layout of their own that a value has its layout from."""
    found, pending, seen = list[fx.Node](), [source], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if op_name(node) in _OWN_LAYOUT:
            found.append(node)
        elif rule_of(node) is not None:
            pending += node.all_input_nodes
    return found


def _keep(node: fx.Node, source: fx.Node) -> bool:
    value, read = value_of(source if op_name(node) in _OWN_LAYOUT else node), value_of(source)
    if value is None or read is None or value.shape != read.shape or source.op in ("placeholder", "get_attr"):
        return False
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda d: -strides[d])
    back = [order.index(d) for d in range(len(order))]
    graph, turned = node.graph, order != sorted(order)
    with graph.inserting_before(node):
        laid = graph.call_method("permute", (source, *order)) if turned else source
        laid = graph.call_method("contiguous", (laid,))
        # a mask that was drawn in place; the functional operation draws in the axes' order, however its input lies
        in_axes_order = turned and op_name(node) == "bernoulli"
        if turned and not in_axes_order:
            laid = graph.call_method("permute", (laid, *back))
    node.replace_input_with(source, laid)
    if in_axes_order:
        with graph.inserting_after(node):
            drawn = graph.call_method("permute", (node, *back))
        drawn.meta = dict(node.meta)
        node.replace_all_uses_with(drawn, delete_user_cb=lambda user: user is not drawn)
    return True
