"""What a region costs under either label: the device's table applied to its nodes, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, fx

from dropfx.devices import DeviceCosts
from dropfx.graphs import argument, op_name, value_of
from dropfx.regions import GEMMS, Prices, Region

Keeps = Callable[[fx.Node], tuple[float, float]]
"""Linear -> kept share of its input and output units, as the other sites have decided."""


def linear_products(node: fx.Node) -> tuple[int, int, int, int]:
    """(M, N, K, products) of a Linear: 1 product forward and one for each gradient that is asked of it."""
    x, weight = value_of(argument(node, 0, "input")), value_of(argument(node, 1, "weight"))
    assert x is not None
    assert weight is not None
    rows = x.numel() // max(x.size(-1), 1)
    return rows, weight.size(0), weight.size(1), 1 + int(x.requires_grad) + int(weight.requires_grad)


def region_prices(region: Region, keep: float, others: Keeps, costs: DeviceCosts) -> Prices:
    """Prices of a region whose site keeps the share `keep`, in integer nanoseconds."""
    compact, dense, take, put = {}, {}, {}, {}
    for node in region.nodes:
        compact[node], dense[node] = _labels(region, node, keep, others, costs)
        for value in (node, *region.wants.get(node, {})):
            elements, itemsize = _size(value)
            # forward copies the kept part, backward fills the dense one; a put is the reverse
            moved = costs.move(elements * keep, itemsize) + costs.move(elements, itemsize, 1 + keep)
            take[value] = put[value] = _nanoseconds(moved)
    return Prices(compact, dense, take, put)


def everything_prices(region: Region) -> Prices:
    """Prices under which the cut computes compact all that can be: matrix products first, then copies saved."""
    value = {node: 10**6 if op_name(node) in GEMMS else 0 for node in region.nodes}
    value |= {node: 10**3 for node in region.sinks if op_name(node) not in GEMMS}
    read = {value: 1 for node in region.nodes for value in (node, *region.wants.get(node, {}))}
    return Prices(dict.fromkeys(region.nodes, 0), value, read, read)


def _labels(region: Region, node: fx.Node, keep: float, others: Keeps, costs: DeviceCosts) -> tuple[int, int]:
    elements, itemsize = _size(node)
    if op_name(node) == "linear":
        keep_in, keep_out = others(node)
        dense = _linear(node, keep_in, keep_out, costs, itemsize)
        if node in region.sinks:
            keep_in = keep
        else:
            keep_out = keep
        return _nanoseconds(_linear(node, keep_in, keep_out, costs, itemsize)), _nanoseconds(dense)
    if node is region.site:
        return _nanoseconds(2 * costs.move(elements * keep, itemsize)), _nanoseconds(costs.dropout(elements, itemsize))
    if node in region.sinks:  # residual add
        kept = costs.move(elements, itemsize) + 2 * costs.move(elements * keep, itemsize)
        return _nanoseconds(kept), _nanoseconds(costs.move(elements, itemsize, 3))
    each = 2 * (1 + len(region.wants.get(node, {})))
    return (
        _nanoseconds(costs.move(elements * keep, itemsize, each)),
        _nanoseconds(costs.move(elements, itemsize, each)),
    )


def _linear(node: fx.Node, keep_in: float, keep_out: float, costs: DeviceCosts, itemsize: int) -> float:
    m, n, k, products = linear_products(node)
    time = products * costs.gemm(m, n * keep_out, k * keep_in, itemsize)
    if keep_in < 1 or keep_out < 1:
        kept = n * k * keep_in * keep_out
        # gather of the weight, then zeros and scatter of its gradient
        time += costs.move(kept, itemsize) + costs.move(n * k, itemsize, 1) + costs.move(kept, itemsize)
    return time


def _size(node: fx.Node) -> tuple[int, int]:
    value = node.meta.get("val")
    return (math.prod(value.shape), value.element_size()) if isinstance(value, Tensor) else (0, 4)


def _nanoseconds(seconds: float) -> int:
    return max(int(seconds * 1e9), 1)
