"""graph(x) -> graph(x, starts_0, run_0, width_0, scale_0, starts_1, ...)        as the fields of the pattern are

Draws enter the graph as inputs, so that nothing can redraw, merge or hoist them (PyTorch issues 190717, 190758).
"""

from __future__ import annotations

from torch import fx

from dropfx.graph.notes import notes, sites_of
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.planning.regions import rows_source


def insert_draws(module: fx.GraphModule, context: Context) -> PassResult:
    """Add the placeholders of every rewritten site, in the order of context.sites, after the graph's own."""
    graph = module.graph
    first_other = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first_other):
        for index, site in enumerate(context.sites):
            if site.rewritten:
                context.draws[index] = {
                    field: graph.placeholder(f"{field}_{index}") for field in context.options.pattern.fields
                }
    if context.options.grouped:
        _insert_rows(graph, context)
    return PassResult(module, bool(context.draws))


def _insert_rows(graph: fx.Graph, context: Context) -> None:
    """Ask the length of each site's leading axis, along which its groups lie, before its first compact value is made.

    It is an output of the graph too: what the draw's mask is depends on it.
    """
    output = graph.output_node()
    for index, draw in context.draws.items():
        if context.sites[index].groups == 1:
            continue
        first = next(node for node in graph.nodes if index in sites_of(node))
        source = rows_source(first)
        with graph.inserting_before(first):
            draw["leading"] = graph.call_method("size", (source, 0))
        if "form" in notes(source):  # its length does not depend on its form
            notes(draw["leading"])["reads"] = {source: notes(source)["form"]}
        output.args = ((*output.args[0], draw["leading"]),)  # type: ignore[misc]
