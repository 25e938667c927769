"""linear(dropout(x), W, b), linear(x, dropout(W), b) -> scale * x @ (W * kept tiles)^T + b"""

from __future__ import annotations

import torch
from torch import fx

from dropfx import ops
from dropfx.graph.nodes import argument, insert, value_of
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.patterns import Tile


def rewrite_tiles(module: fx.GraphModule, context: Context) -> PassResult:
    """Replace the Linears that the plan marked; the dropouts before them have no reader left."""
    pattern = context.options.pattern
    if not isinstance(pattern, Tile):
        return PassResult(module, False)
    graph = module.graph
    replaced: set[fx.Node] = set()
    for node in list(graph.nodes):
        if "tiles" not in notes(node):
            continue
        site, draw = context.sites[notes(node)["tiles"]].node, context.draws[notes(node)["tiles"]]
        assert site is not None
        undropped = _undropped(site)
        x, weight = (undropped if v is site else v for v in (argument(node, 0, "input"), argument(node, 1, "weight")))
        with graph.inserting_before(node):
            args = (x, weight, argument(node, 2, "bias"), *pattern.shape, draw["lattice"], draw["scale"])
            new = insert(graph, ops.tiled_linear_op, args, like=node)
            del notes(new)["tiles"]
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        replaced.add(site)
    for site in replaced:
        graph.erase_node(site)
    return PassResult(module, bool(replaced))


def _undropped(site: fx.Node) -> fx.Node:
    """The input of a dropout, without its gradient where the dropout runs under no_grad and its readers do not."""
    source: fx.Node = argument(site, 0, "input")
    value, dropped = value_of(source), value_of(site)
    if value is None or dropped is None or dropped.requires_grad or not value.requires_grad:
        return source
    with site.graph.inserting_before(site):
        return insert(site.graph, torch.detach, (source,), like=site)
