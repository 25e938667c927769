"""graph(x) -> graph(x, starts_0, run_0, width_0, scale_0, rate_1, ...)

Draws enter the graph as inputs, so that nothing can redraw, merge or hoist them (PyTorch issues 190717, 190758).
"""

from __future__ import annotations

from torch import fx

from dropfx.pass_infra import Context, PassResult

FIELDS = ("starts", "run", "width", "scale")
"""Inputs of a site, in order: as the fields of `draws.Draw`."""


def insert_draws(module: fx.GraphModule, context: Context) -> PassResult:
    """Add the placeholders of every rewritten site, in the order of context.sites, after the graph's own.

    A site that runs as written takes its rate as an input where the rate is an attribute that may change.
    """
    graph = module.graph
    first_other = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first_other):
        for index, site in enumerate(context.sites):
            if site.rewritten:
                context.draws[index] = {field: graph.placeholder(f"{field}_{index}") for field in FIELDS}
            elif site.takes_rate and site.node is not None:
                _set_rate(site.node, graph.placeholder(f"rate_{index}"))
    return PassResult(module, True)


def _set_rate(node: fx.Node, rate: fx.Node) -> None:
    if "p" in node.kwargs:
        node.update_kwarg("p", rate)
    else:
        node.args = (node.args[0], rate, *node.args[2:]) if node.args else node.args
