"""graph(x) -> graph(x, starts_0, run_0, width_0, scale_0, starts_1, ...)        as the fields of the pattern are

Draws enter the graph as inputs, so that nothing can redraw, merge or hoist them (PyTorch issues 190717, 190758).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dropfx.graph.nodes import value_of
from dropfx.graph.notes import notes, sites_of
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.planning.rows import length_before


def insert_draws(module: fx.GraphModule, context: Context) -> PassResult:
    """Add the placeholders of every rewritten site, in the order of context.sites, after the graph's own."""
    graph = module.graph
    first_other = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first_other):
        for index, site in enumerate(context.sites):
            if site.rewritten and site.pattern is not None and not site.by_rows:
                context.draws[index] = {field: graph.placeholder(f"{field}_{index}") for field in site.pattern.fields}
    if context.options.grouped:
        _insert_rows(graph, context)
    return PassResult(module, bool(context.draws))


def _insert_rows(graph: fx.Graph, context: Context) -> None:
    """Ask the length of each site's leading axis, along which its groups lie, before its first compact value is made.

    It is an output of the graph too: what the draw's mask is depends on it.
    """
    output = graph.output_node()
    for index, draw in context.draws.items():
        site = context.sites[index]
        if site.groups == 1:
            continue
        assert site.node is not None
        first = next(node for node in graph.nodes if index in sites_of(node))
        draw["leading"] = _leading(graph, first, site.node)
        output.args = ((*output.args[0], draw["leading"]),)  # type: ignore[misc]


def _leading(graph: fx.Graph, first: fx.Node, site: fx.Node) -> Any:
    emits = notes(first).get("form")
    found = length_before(first, None if emits is None else emits.axis, site)
    assert found is not None
    if isinstance(found, int):
        return found
    with graph.inserting_before(first):
        length = graph.call_method("size", found)
    (source, dim), value = found, value_of(found[0])
    form = notes(source).get("form")
    if form is not None and value is not None and value.dim() + form.axis.dim != dim:  # the length is the dense one's
        notes(length)["reads"] = {source: form}
    return length
