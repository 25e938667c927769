"""Decide which sites drop tiles of a weight, where the pattern does that.

A site on the input of Linears hands its dropout on to their weights (structured DropConnect in place of dropout of
units); a site on a weight stays where it is. After this pass `notes(node)["tiles"]` of a Linear names its site.
"""

from __future__ import annotations

from torch import fx

from dropfx.graph.layers import products_of
from dropfx.graph.nodes import argument, clean_up, op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult, Site
from dropfx.patterns import PatternRefused, Tile
from dropfx.planning.cost_model import tiled_times


def plan_tiles(module: fx.GraphModule, context: Context) -> PassResult:
    """Fit the pattern to the weights after each site; sites that are not worth it get their reason."""
    pattern, modified = context.options.pattern, False
    if isinstance(pattern, Tile):
        modified = clean_up(module.graph)  # a Linear that nobody reads is no reader
        for index, site in enumerate(context.sites):
            if site.rewritten:
                site.reason = _plan(index, site, context, pattern)
    return PassResult(module, modified)


def _plan(index: int, site: Site, context: Context, pattern: Tile) -> str:
    """Mark the Linears and return "", or the reason why not."""
    assert site.node is not None
    linears = list(site.node.users)
    if not linears or not all(_is_plain_linear(user, site.node) for user in linears):
        return "its output is not read by Linears alone, whose weights could drop tiles"
    if any("tiles" in notes(user) for user in linears):
        return "a Linear that reads it drops tiles of its weight for another site"
    shapes = [products_of(user)[1:3] for user in linears]
    try:
        site.fit = context.options.pattern.fit(min(pattern.tiles(*shape) for shape in shapes), site.rate)
    except PatternRefused as refusal:
        return str(refusal)
    dense, tiled = tiled_times(site.node, linears, site.fit.keep, context.costs)
    site.predicted_speedup = dense / tiled
    if site.predicted_speedup < context.options.min_speedup:
        return f"predicted speed-up {site.predicted_speedup:.2f} is below min_speedup={context.options.min_speedup:g}"
    site.weights = shapes
    for user in linears:
        notes(user)["tiles"] = index
        m, n, k, products = products_of(user)
        flops = 2 * m * n * k * products
        site.flops_dense += flops
        site.flops_compact += round(flops * site.fit.keep)
    context.flops_compact -= site.flops_dense - site.flops_compact
    site.seconds_saved = dense - tiled
    context.seconds_planned -= site.seconds_saved
    return ""


def _is_plain_linear(user: fx.Node, site: fx.Node) -> bool:
    if op_name(user) != "linear" or value_of(user) is None:
        return False
    weight = value_of(argument(user, 1, "weight"))
    reads = [argument(user, 0, "input"), argument(user, 1, "weight"), argument(user, 2, "bias")]
    return weight is not None and weight.dim() == 2 and reads.count(site) == 1 and reads[2] is not site
