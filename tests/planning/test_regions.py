"""The minimum cut against brute force: no labelling of a region is cheaper than the one it returns.

The brute force labels every node of a region in every way and prices each labelling by the rules of section 3 of
docs/how_it_works.md, written out anew here: a cost for each node, one for each value read in the other form (once a
value, not a reader), infinity for what cannot be. It shares the prices of nodes and transfers with the library, and
nothing of the cut.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dropfx.graph.device_costs import DeviceCosts
from dropfx.graph.notes import UnitAxis
from dropfx.graph.pass_infra import Context
from dropfx.options import make_options
from dropfx.passes.canonicalize import canonicalize
from dropfx.passes.find_sites import find_sites
from dropfx.passes.functionalize import functionalize
from dropfx.planning.cost_model import everything_prices, region_prices
from dropfx.planning.min_cut import Prices, cut, price
from dropfx.planning.regions import Region, grow
from tests.capture import symbolic


class Net(nn.Module):
    """Layers of a 64-128-64 perceptron whose forward is given."""

    def __init__(self, body: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(128, 64)
        self.other, self.norm, self.vector = nn.Linear(64, 128), nn.LayerNorm(128), nn.Parameter(torch.ones(128))
        self.words, self.body = nn.Embedding(50, 128), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def several_linears(m: Net, x: Tensor) -> Tensor:
    h = F.dropout(F.relu(m.first(x)))
    return m.second(h) + m.third(h)


def dense_reader_before(m: Net, x: Tensor) -> Tensor:
    h = F.relu(m.first(x))
    return m.second(F.dropout(torch.tanh(h))).sum() + h.sum()


def dense_reader_after(m: Net, x: Tensor) -> Tensor:
    h = F.dropout(F.relu(m.first(x)))
    return m.second(F.gelu(h)).sum() + h.sum()


def both_sides_of_the_site(m: Net, x: Tensor) -> Tensor:
    h = F.relu(m.first(x))
    return m.second(F.dropout(h) * h)


def dense_reader_at_the_end(m: Net, x: Tensor) -> Tensor:
    h = F.gelu(torch.tanh(F.dropout(m.first(x))))
    return m.second(h).sum() + m.norm(h).sum()


def chain(m: Net, x: Tensor) -> Tensor:
    return m.second(F.dropout(F.relu(m.first(x))))


BODIES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "chain": chain,
    "long chain": lambda m, x: m.second(F.gelu(F.dropout(torch.tanh(F.relu(m.first(x))) * 2.0)) * 3.0),
    "several linears": several_linears,
    "dense reader before": dense_reader_before,
    "dense reader after": dense_reader_after,
    "dense reader at the end": dense_reader_at_the_end,
    "both sides of the site": both_sides_of_the_site,
    "residual add": lambda m, x: m.other(x) + F.dropout(m.first(x)),
    "residual add behind gelu": lambda m, x: m.second(m.other(x) + F.gelu(F.dropout(F.relu(m.first(x))))),
    "sigmoid after the site": lambda m, x: m.second(torch.sigmoid(F.dropout(F.relu(m.first(x))))),
    "LayerNorm before the site": lambda m, x: m.second(F.dropout(F.relu(m.norm(m.first(x))))),
    "LayerNorm after the site": lambda m, x: m.second(m.norm(F.gelu(F.dropout(m.first(x))))),
    "two producers": lambda m, x: m.second(F.dropout(m.first(x) + F.relu(m.other(x)))),
    "vector before": lambda m, x: m.second(F.dropout(m.first(x) + m.vector)),
    "vector after": lambda m, x: m.second(F.dropout(m.first(x)) * m.vector),
    "embedding": lambda m, x: m.second(F.dropout(m.words(x.long().abs() % 50))),
    "views": lambda m, x: m.second(F.dropout(m.first(x).view(2, 4, 128)).transpose(0, 1)),
    "no producer": lambda m, x: F.linear(F.dropout(x), m.first.weight),
}

TABLES = {
    "products": DeviceCosts(flops={4: 1e9}, bytes=1e12, random=1e12, launch=1e-9),
    "traffic": DeviceCosts(flops={4: 1e14}, bytes=1e9, random=1e9, launch=1e-9),
    "launches": DeviceCosts(flops={4: 1e14}, bytes=1e12, random=1e12, launch=1e-4),
    "balanced": DeviceCosts(flops={4: 1e11}, bytes=2e10, random=1e8, launch=5e-6),
}
"""Devices on which one kind of work costs almost all."""


def region_of(body: Callable[[Net, Tensor], Tensor], *, taken: str = "") -> Region:
    """The region of the one site of a forward; the node named `taken` is compact for another site."""
    context = Context(make_options(), TABLES["balanced"])
    net = Net(body)
    module = fx.GraphModule(net, symbolic(net, (torch.randn(8, 64),)))
    for step in (functionalize, canonicalize, find_sites):
        module, _ = step(module, context)
    (site,) = context.sites
    return grow(module, site, {n for n in module.graph.nodes if n.name == taken})


def cost(region: Region, compact: set[fx.Node], prices: Prices) -> float:
    """What a labelling costs; infinity where it cannot be."""
    total = sum(prices.compact[n] if n in compact else prices.dense[n] for n in region.nodes)
    for value in {operand for reader in region.wants.values() for operand in reader} | set(region.forms):
        as_compact = [r for r in value.users if r in compact and value in region.wants.get(r, {})]
        as_dense = [r for r in value.users if r not in as_compact]
        before, after = value in region.before, value in region.forms and value not in region.before
        if value in compact and value in region.forms and as_dense:
            # dropped values were never computed before the site; after it they are known to be 0
            total += math.inf if before else prices.scatter[value]
        elif not (value in compact and value in region.forms) and as_compact:
            total += math.inf if after else prices.gather[value]
    return total


def labellings(region: Region) -> Iterator[set[fx.Node]]:
    """All ways to label a region whose site is rewritten."""
    free = [n for n in region.nodes if n is not region.site]
    for picked in itertools.product([False, True], repeat=len(free)):
        yield {region.site, *itertools.compress(free, picked)}


def random_prices(region: Region, seed: int) -> Prices:
    """Small integers, so that ties and zeros occur."""
    draw = random.Random(seed)
    values = list(dict.fromkeys(v for n in region.nodes for v in (n, *region.wants.get(n, {}))))

    def figures(of: list[fx.Node]) -> dict[fx.Node, int]:
        return {node: draw.randrange(12) for node in of}

    nodes = list(region.nodes)
    return Prices(figures(nodes), figures(nodes), figures(values), figures(values))


def assert_cheapest(region: Region, prices: Prices) -> None:
    best = min(cost(region, labels, prices) for labels in labellings(region))
    found = cut(region, prices)
    assert region.site in found
    assert found <= set(region.nodes)
    assert best < math.inf
    assert cost(region, found, prices) == best


each_body = pytest.mark.parametrize("name", BODIES)


@each_body
def test_cut_is_cheapest_under_arbitrary_prices(name: str) -> None:
    region = region_of(BODIES[name])
    for seed in range(40):
        assert_cheapest(region, random_prices(region, seed))


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("table", TABLES)
@each_body
def test_cut_is_cheapest_under_prices_of_a_device(name: str, table: str, keep: float) -> None:
    region = region_of(BODIES[name])
    assert_cheapest(region, region_prices(region, keep, lambda node: (1.0, 1.0), TABLES[table]))


@each_body
def test_cut_is_cheapest_where_other_sites_shrink_the_linears(name: str) -> None:
    region = region_of(BODIES[name])
    assert_cheapest(region, region_prices(region, 0.5, lambda node: (0.25, 0.5), TABLES["balanced"]))


@each_body
def test_cut_is_cheapest_under_prices_that_want_everything(name: str) -> None:
    region = region_of(BODIES[name])
    assert_cheapest(region, everything_prices(region))


@each_body
def test_price_of_every_labelling_that_can_be_is_its_cost(name: str) -> None:
    region = region_of(BODIES[name])
    prices = random_prices(region, 0)
    for labels in labellings(region):
        expected = cost(region, labels, prices)
        assert expected == math.inf or price(region, labels, prices) == expected


# -- what the cuts look like ----------------------------------------------------------------------------------------


def names(nodes: set[fx.Node]) -> set[str]:
    return {node.name for node in nodes}


def flat_prices(region: Region, *, compact: int, dense: int, transfer: int) -> Prices:
    nodes = list(region.nodes)
    values = {v: transfer for n in nodes for v in (n, *region.wants.get(n, {}))}
    return Prices(dict.fromkeys(nodes, compact), dict.fromkeys(nodes, dense), values, values)


def test_cheap_compact_nodes_are_compact_throughout() -> None:
    region = region_of(chain)
    assert names(cut(region, flat_prices(region, compact=1, dense=5, transfer=1))) == names(set(region.nodes))


def test_dear_compact_nodes_leave_the_site_alone() -> None:
    region = region_of(chain)
    assert cut(region, flat_prices(region, compact=9, dense=1, transfer=1)) == {region.site}


def test_dear_transfers_pull_a_neighbour_into_the_region() -> None:
    """Computing it compact costs more than dense, but less than reading the site's value in the other form."""
    region = region_of(chain)
    assert names(cut(region, flat_prices(region, compact=4, dense=1, transfer=100))) == names(set(region.nodes))


def test_value_read_dense_by_two_is_converted_once() -> None:
    """Two dense Linears save 4 each against compact ones; a put of 6 for both pays, one for each would not."""
    region = region_of(several_linears)
    prices = flat_prices(region, compact=5, dense=1, transfer=6)
    prices.compact.update(dict.fromkeys(region.forms, 0))
    assert not cut(region, prices) & region.sinks


def test_dense_reader_before_the_site_forbids_compact_whatever_it_costs() -> None:
    region = region_of(dense_reader_before)
    compact = cut(region, flat_prices(region, compact=0, dense=10**9, transfer=1))
    assert {"relu", "linear"} <= names(set(region.forms))
    assert not {"relu", "linear"} & names(compact)
    assert "tanh" in names(compact)


def test_sum_over_a_compact_value_costs_a_put() -> None:
    region = region_of(dense_reader_after)
    prices = flat_prices(region, compact=0, dense=10**6, transfer=7)
    assert price(region, cut(region, prices), prices) == 7


# -- how far a region grows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forms", "sinks"),
    [
        ("chain", {"linear", "relu", "dropout"}, {"linear_1"}),
        ("several linears", {"linear", "relu", "dropout"}, {"linear_1", "linear_2"}),
        ("residual add", {"linear_1", "dropout"}, {"add"}),
        ("sigmoid after the site", {"linear", "relu", "dropout"}, set()),
        ("LayerNorm before the site", {"relu", "dropout"}, {"linear_1"}),
        ("LayerNorm after the site", {"linear", "dropout", "gelu"}, set()),
        ("two producers", {"linear", "linear_1", "relu", "add", "dropout"}, {"linear_2"}),
    ],
)
def test_region_ends_at_consumers_and_where_zeros_are_lost(name: str, forms: set[str], sinks: set[str]) -> None:
    region = region_of(BODIES[name])
    assert names(set(region.forms)) == forms
    assert names(region.sinks) == sinks


def test_nodes_before_the_site_are_known() -> None:
    region = region_of(dense_reader_after)
    assert names(region.before) == {"linear", "relu"}


def test_node_compact_for_another_site_counts_as_dense() -> None:
    region = region_of(chain, taken="relu")
    assert names(set(region.forms)) == {"dropout"}


def test_views_carry_the_axis_to_where_the_units_lie() -> None:
    region = region_of(lambda m, x: F.dropout(m.first(x)).t())
    assert {n.name: axis for n, axis in region.forms.items()}["t"] == UnitAxis(-2)
