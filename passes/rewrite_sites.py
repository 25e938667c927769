"""dropout(x) -> gather(x) * scale, with a gather or a scatter wherever a value is read in the other form.

After this pass every node reads its operands in the form that the plan gave it; Linears and views still have their
dense spelling.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from dropfx import ops
from dropfx.graph.nodes import argument, insert, memory_order, value_of
from dropfx.graph.notes import Form, notes
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.planning.rows import same_rows


def rewrite_sites(module: fx.GraphModule, context: Context) -> PassResult:
    """Place the conversions, then replace the dropouts."""
    graph = module.graph
    converted: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        reads = notes(node).get("reads", {})
        for operand in node.all_input_nodes:
            have, want = notes(operand).get("form"), reads.get(operand)
            if have == want:
                continue
            with graph.inserting_before(operand.next):
                source = _scatter(operand, have, context, converted) if have else operand
            if want:
                with graph.inserting_before(node):
                    source = _gather(source, operand, node, want, context, converted)
            node.replace_input_with(operand, source)
    for index, draw in context.draws.items():
        site = context.sites[index]
        if site.node is not None and not site.by_rows and not context.options.pattern.drops_weights:
            _scale(site.node, draw["scale"], site.axis)
    return PassResult(module, bool(context.draws))


def kept_of(graph: fx.Graph, form: Form, context: Context) -> ops.Kept:
    """What a form keeps, in positions of its axis, as nodes."""
    draw: Any = context.draws[form.site]
    starts, run, leading = draw["starts"], draw["run"], draw.get("leading", 0)
    if form.axis.factor > 1:
        starts = graph.call_function(operator.mul, (starts, form.axis.factor))
        run = graph.call_function(operator.mul, (run, form.axis.factor))
    return ops.Kept(starts, run, leading)


def _gather(
    source: fx.Node,
    dense: fx.Node,
    reader: fx.Node,
    form: Form,
    context: Context,
    done: dict[Any, fx.Node],
) -> fx.Node:
    graph = source.graph
    if context.draws[form.site].get("leading") and not same_rows(dense, reader, form.axis):
        like = next(o for o in reader.all_input_nodes if same_rows(o, reader, form.axis))
        source = graph.call_function(ops.spread_rows, (source, like, form.axis.dim))
    # under another grad mode or autocast it would be another value
    key = (source, form, notes(reader).get("after_effects"))
    if key not in done or "pinned" in notes(dense):  # a write between two readers changes what they take
        kept = kept_of(graph, form, context)
        done[key] = move(graph, ops.gather_op, source, kept, form.axis.dim, value_of(source))
        done[key].meta |= {name: note for name, note in dense.meta.items() if name != "reads"}
        notes(done[key])["form"] = form
    return done[key]


def _scatter(operand: fx.Node, form: Form, context: Context, done: dict[Any, fx.Node]) -> fx.Node:
    key = (operand, None)
    if key not in done:
        graph, value = operand.graph, value_of(operand)
        assert value is not None
        units = value.shape[form.axis.dim]
        kept = kept_of(graph, form, context)
        done[key] = move(graph, ops.scatter_op, operand, kept, form.axis.dim, value, units)
        done[key].meta = {"val": value}
    return done[key]


def move(
    graph: fx.Graph, op: Any, source: fx.Node, kept: ops.Kept, dim: int, value: Tensor | None, *rest: Any
) -> fx.Node:
    """A gather or scatter along an axis (negative) of what stands for a dense value: it lies in memory as that does."""
    known = value is not None and value.dim() + dim >= 0 and 0 not in value.stride()  # 0: it was expanded
    order = list(memory_order(value)) if value is not None and known else []
    turned = order != sorted(order) and (order[0] == 0 or not kept.leading)
    if not turned:
        return graph.call_function(op, ops.flat(op, source, kept, dim, *rest))
    laid = graph.call_method("permute", (source, *order))
    if (form := notes(source).get("form")) is not None:
        notes(laid)["reads"] = {source: form}
    place = order.index(len(order) + dim) - len(order)
    made = graph.call_function(op, ops.flat(op, laid, kept, place, *rest))
    return graph.call_method("permute", (made, *(order.index(axis) for axis in range(len(order)))))


def _scale(node: fx.Node, scale: fx.Node, axis: int) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        new = insert(graph, ops.scale_units, (argument(node, 0, "input"), scale, axis), like=node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
