"""The cut: which part of a region is computed compact.

A binary labelling, compact or dense, of minimum total cost: a minimum s-t cut with the source on the compact side. An
arc a -> b is paid when a is compact and b dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx as nx
from networkx.algorithms.flow import shortest_augmenting_path
from torch import fx

from dropfx.graph.nodes import value_of
from dropfx.planning.regions import Region

_INFINITE = float("inf")  # given, not left out: adding an edge again keeps an earlier capacity


@dataclass(frozen=True)
class Prices:
    """Costs of a region in integer nanoseconds.

    Attributes:
        compact, dense: of each node under either label.
        gather, scatter: of reading a dense value compact, of reading a compact value dense; once per value.
    """

    compact: dict[fx.Node, int]
    dense: dict[fx.Node, int]
    gather: dict[fx.Node, int]
    scatter: dict[fx.Node, int]


def cut(region: Region, prices: Prices) -> set[fx.Node]:
    """The nodes to compute compact, at minimum cost, given that the site is rewritten."""
    graph = nx.DiGraph()
    graph.add_edge("compact", region.site, capacity=_INFINITE)
    for node in region.nodes:
        graph.add_edge(node, "dense", capacity=prices.compact[node])
        if node is not region.site:
            graph.add_edge("compact", node, capacity=prices.dense[node])
        for operand in region.wants.get(node, {}):
            _read_compact(graph, region, node, operand, prices)
        if node in region.forms:
            for reader in node.users:
                if node not in region.wants.get(reader, {}) or reader not in {*region.forms, *region.sinks}:
                    _read_dense(graph, region, node, "dense", prices)
    _, (compact, _) = nx.minimum_cut(graph, "compact", "dense", flow_func=shortest_augmenting_path)
    return {node for node in region.nodes if node in compact}


def _read_compact(graph: nx.DiGraph, region: Region, reader: fx.Node, value: fx.Node, prices: Prices) -> None:
    """`reader`, if compact, reads `value` compact: a gather if the value is dense."""
    taken = ("gather", value)
    graph.add_edge(reader, taken, capacity=_INFINITE)
    # a dense value after the site is not taken again: its units may be others than the padding of a ragged block
    retaken = value in region.forms and value not in region.before
    capacity = _INFINITE if retaken or value_of(value) is None else prices.gather[value]
    graph.add_edge(taken, value if value in region.forms else "dense", capacity=capacity)
    if value in region.forms:
        _read_dense(graph, region, value, reader, prices)


def _read_dense(graph: nx.DiGraph, region: Region, value: fx.Node, reader: Any, prices: Prices) -> None:
    """`reader`, if dense, reads `value` dense: a scatter if the value is compact, impossible before the site."""
    if value in region.before or value_of(value) is None:  # several results: each is read by its getitem
        graph.add_edge(value, reader, capacity=_INFINITE)
        return
    graph.add_edge(value, ("scatter", value), capacity=prices.scatter[value])
    graph.add_edge(("scatter", value), reader, capacity=_INFINITE)


def price(region: Region, compact: set[fx.Node], prices: Prices) -> int:
    """Cost of a labelling in nanoseconds: what the cut minimises."""
    total = sum(prices.compact[n] if n in compact else prices.dense[n] for n in region.nodes)
    taken = {o for n in compact for o in region.wants.get(n, {}) if o not in compact}
    scatter = {
        n
        for n in compact & region.forms.keys() - region.before
        if any(r not in compact or n not in region.wants.get(r, {}) for r in n.users)
    }
    return total + sum(prices.gather[n] for n in taken) + sum(prices.scatter[n] for n in scatter)
