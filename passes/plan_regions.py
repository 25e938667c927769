"""Decide for each site what is computed compact, and write it on the nodes.

After this pass the note "form" says that a node emits compact values, "reads" in which form it reads its operands; both
name the site and the axis. A Linear between two sites couples them, and its price is not submodular, so one site is
cut at a time with the others fixed, in sweeps until nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dropfx import ops
from dropfx.graph.layers import multiplies, products_of
from dropfx.graph.nodes import op_name
from dropfx.graph.notes import Form, notes
from dropfx.graph.op_families import CONVOLUTIONS
from dropfx.graph.pass_infra import Context, PassResult, Site
from dropfx.planning.cost_model import everything_prices, recurrent_flops, region_prices, step_times
from dropfx.planning.fused_rnn import in_one_piece
from dropfx.planning.min_cut import cut, price
from dropfx.planning.regions import Region, RegionRefused, ends, grow, is_product

_SWEEPS = 5


@dataclass
class _Choice:
    region: Region
    compact: set[fx.Node]


def plan_regions(module: fx.GraphModule, context: Context) -> PassResult:
    """Choose the compact nodes of every site; sites that are not worth it get their reason."""
    chosen: dict[int, _Choice] = {}
    for node in module.graph.find_nodes(op="call_function", target=ops.recurrence_op):
        notes(node)["one_piece"] = in_one_piece(node, context)
    _prefer_reasons_of_neighbours(module, context)
    # a pattern of tiles has fitted nothing to an axis of units
    candidates = [
        i for i, site in enumerate(context.sites) if site.rewritten and site.fit is not None and not site.by_rows
    ]
    for _ in range(_SWEEPS):
        before = {i: choice.compact for i, choice in chosen.items()}
        for index in candidates:
            chosen.pop(index, None)
            choice = _choose(module, context, index, chosen)
            if choice is not None:
                chosen[index] = choice
        if {i: choice.compact for i, choice in chosen.items()} == before:
            break
    for index, choice in chosen.items():
        _annotate(index, choice)
    _count_flops(module.graph, context, chosen)
    skipped = sum(site.seconds_saved for site in context.sites if site.by_rows)  # the graph has kept rows by now
    written, context.seconds_planned = step_times(module.graph, context)
    context.seconds_written = written + skipped
    return PassResult(module, False)


def _prefer_reasons_of_neighbours(module: fx.GraphModule, context: Context) -> None:
    """`explain` names what no other pattern mends, where a site's pattern does not fit and its neighbours refuse."""
    for site in context.sites:
        if site.reason and site.node is not None and site.rank and not site.by_rows:
            try:
                grow(module, site, set())
            except RegionRefused as refusal:
                site.reason = str(refusal)


def _choose(module: fx.GraphModule, context: Context, index: int, chosen: dict[int, _Choice]) -> _Choice | None:
    site, options = context.sites[index], context.options
    assert site.fit is not None
    taken = {n for i, c in chosen.items() for n in c.compact if not _takes_both(n, site, context.sites[i])}
    try:
        region = grow(module, site, taken)
    except RegionRefused as refusal:
        site.reason = str(refusal)
        return None
    fit = site.fit
    prices = region_prices(region, fit.keep, lambda node: _keeps(node, context, chosen), context.costs, fit.groups)
    compact = cut(region, prices if options.min_speedup > 0 else everything_prices(region))
    site.predicted_speedup = sum(prices.dense.values()) / max(price(region, compact, prices), 1)
    site.reason = ""
    if not any(map(is_product, compact)):
        site.reason = _no_gain(region)
    elif site.predicted_speedup < options.min_speedup:
        site.reason = f"predicted speed-up {site.predicted_speedup:.2f} is below min_speedup={options.min_speedup:g}"
    return None if site.reason else _Choice(region, compact)


def _takes_both(node: fx.Node, site: Site, other: Site) -> bool:
    """Whether a node that is compact for the other site can be so for this one too: a layer, on its other side.

    A convolution is made once for each group of rows, and so the groups must be the same.
    """
    alike = op_name(node) not in CONVOLUTIONS or 1 in (site.groups, other.groups) or site.groups == other.groups
    return multiplies(node) and alike


def _no_gain(region: Region) -> str:
    if any(map(is_product, region.nodes)):
        return "moving its kept units costs more than it saves"
    return "no Linear, convolution or Embedding next to it could skip work" + ends(region)


def _keeps(node: fx.Node, context: Context, chosen: dict[int, _Choice]) -> tuple[float, float]:
    keep_in = keep_out = 1.0
    for index, choice in chosen.items():
        if node not in choice.compact:
            continue
        fit = context.sites[index].fit
        assert fit is not None
        if node in choice.region.sinks:
            keep_in = fit.keep
        else:
            keep_out = fit.keep
    return keep_in, keep_out


def _annotate(index: int, choice: _Choice) -> None:
    for node in choice.compact:
        if node in choice.region.forms:
            notes(node)["form"] = Form(index, choice.region.forms[node])
        wants = choice.region.wants.get(node, {})
        if wants:
            notes(node)["reads"] = {operand: Form(index, axis) for operand, axis in wants.items()}


def _count_flops(graph: fx.Graph, context: Context, chosen: dict[int, _Choice]) -> None:
    """FLOPs of layers and recurrences, forward and backward: of the model, and around each site."""
    for node in graph.nodes:
        if node.target is ops.recurrence_op:
            _count_recurrent(node, context, chosen)
        if not multiplies(node):
            continue
        m, n, k, products = products_of(node)
        keep_in, keep_out = _keeps(node, context, chosen)
        dense = 2 * m * n * k * products
        compact = round(dense * keep_in * keep_out)
        context.flops_dense += dense
        context.flops_compact += compact
        for site in _sites_at(node, context, chosen):
            site.flops_dense += dense
            site.flops_compact += compact


def _count_recurrent(node: fx.Node, context: Context, chosen: dict[int, _Choice]) -> None:
    dense, compact = (recurrent_flops(node, keep) for keep in (1.0, _keeps(node, context, chosen)[0]))
    context.flops_dense += dense
    context.flops_compact += compact
    for site in _sites_at(node, context, chosen):
        site.flops_dense += dense
        site.flops_compact += compact


def _sites_at(node: fx.Node, context: Context, chosen: dict[int, _Choice]) -> list[Site]:
    return [context.sites[i] for i, choice in chosen.items() if node in choice.compact]
