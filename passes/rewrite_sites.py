"""dropout(x) -> take(x) * scale, with a take or a put wherever a value is read in the other form.

After this pass every node reads its operands in the form that the plan gave it; Linears and views still have their
dense spelling.
"""

from __future__ import annotations

import operator

from torch import fx

from dropfx import ops
from dropfx.graphs import argument, insert, value_of
from dropfx.pass_infra import Context, PassResult
from dropfx.passes.plan_regions import Form


def rewrite_sites(module: fx.GraphModule, context: Context) -> PassResult:
    """Place the conversions, then replace the dropouts."""
    graph = module.graph
    converted: dict[tuple[fx.Node, Form | None], fx.Node] = {}
    for node in list(graph.nodes):
        reads = node.meta.get("reads", {})
        for operand in node.all_input_nodes:
            have, want = operand.meta.get("form"), reads.get(operand)
            if have == want:
                continue
            with graph.inserting_after(operand):
                source = _put(operand, have, context, converted) if have else operand
            if want:
                with graph.inserting_before(node):
                    source = _take(source, operand, want, context, converted)
            node.replace_input_with(operand, source)
    for index, site in enumerate(context.sites):
        if site.rewritten and site.node is not None:
            _scale(site.node, context.draws[index]["scale"], site.axis)
    return PassResult(module, bool(context.draws))


def runs_of(graph: fx.Graph, form: Form, context: Context) -> tuple[fx.Node, fx.Node]:
    """Nodes of the kept runs of a form: starts and run length, in positions of its axis."""
    draw = context.draws[form.site]
    starts, run = draw["starts"], draw["run"]
    if form.axis.factor == 1:
        return starts, run
    return (
        graph.call_function(operator.mul, (starts, form.axis.factor)),
        graph.call_function(operator.mul, (run, form.axis.factor)),
    )


def _take(
    source: fx.Node, dense: fx.Node, form: Form, context: Context, done: dict[tuple[fx.Node, Form | None], fx.Node]
) -> fx.Node:
    key = (source, form)
    if key not in done:
        graph = source.graph
        done[key] = insert(graph, ops.take_op, (source, *runs_of(graph, form, context), form.axis.dim), like=dense)
        done[key].meta.pop("reads", None)
        done[key].meta["form"] = form
    return done[key]


def _put(operand: fx.Node, form: Form, context: Context, done: dict[tuple[fx.Node, Form | None], fx.Node]) -> fx.Node:
    key = (operand, None)
    if key not in done:
        graph, value = operand.graph, value_of(operand)
        assert value is not None
        units = value.shape[form.axis.dim]
        starts, run = runs_of(graph, form, context)
        done[key] = insert(graph, ops.put_op, (operand, starts, run, form.axis.dim, units), like=operand)
        done[key].meta = {"val": value}
    return done[key]


def _scale(node: fx.Node, scale: fx.Node, axis: int) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        new = insert(graph, ops.scale_units, (argument(node, 0, "input"), scale, axis), like=node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
