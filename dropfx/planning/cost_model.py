"""What a region costs under either label: the device's table applied to its nodes, forward and backward."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from dropfx import ops
from dropfx.graph.axis_rules import COPIES, PERMUTATIONS, RESHAPES
from dropfx.graph.device_costs import DeviceCosts
from dropfx.graph.dropout_ops import DROPOUT_FUNCTIONS
from dropfx.graph.layers import multiplies, products_of
from dropfx.graph.nodes import argument, matrix_of, op_name, value_of
from dropfx.graph.notes import Form, forms_of, notes, sites_of
from dropfx.graph.op_families import ALL_CONVOLUTIONS, GEMMS, SPLITS, SUMS
from dropfx.graph.pass_infra import Context
from dropfx.planning.layer_times import Share, layer_time, recurrent_times
from dropfx.planning.min_cut import Prices
from dropfx.planning.regions import Region, drops, is_product

Keeps = Callable[[fx.Node], tuple[float, float]]
"""Layer -> kept share of its input and output units, as the other sites have decided."""


def recurrent_flops(node: fx.Node, keep: float = 1.0) -> int:
    """FLOPs of a recurrence's products with W_hh, of which a share is kept, and W_hr: forward and both gradients."""
    pre, weights = value_of(node.args[1]), [value_of(node.args[place]) for place in (4, 6)]
    assert pre is not None
    rows = pre.numel() // pre.size(-1)
    shares = zip(weights, (keep, 1.0), strict=True)
    return sum(round(2 * rows * weight.numel() * 3 * share) for weight, share in shares if weight is not None)


def region_prices(region: Region, keep: float, others: Keeps, costs: DeviceCosts, groups: int = 1) -> Prices:
    """Prices of a region whose site keeps the share `keep` in each of `groups` draws, in integer nanoseconds."""
    compact, dense, gather, scatter = {}, {}, {}, {}
    readers = Counter(_weight_read(region, node) for node in region.nodes if op_name(node) == "linear")
    for node in region.nodes:
        # of several groups each product gathers its own
        sharing = readers[_weight_read(region, node)] if op_name(node) == "linear" and groups == 1 else 1
        compact[node], dense[node] = _labels(region, node, keep, others, costs, groups, sharing)
        for value in (node, *region.wants.get(node, {})):
            elements, itemsize = _size(value)
            # forward copies the kept part, backward fills the dense one; a scatter is the reverse
            moved = costs.move(elements * keep, itemsize) + costs.move(elements, itemsize, 1 + keep)
            moved += 2 * (groups - 1) * costs.launch
            gather[value] = scatter[value] = _nanoseconds(moved + costs.gathered)
    return Prices(compact, dense, gather, scatter)


def _weight_read(region: Region, linear: fx.Node) -> tuple[Any, bool]:
    """A Linear's weight, and whether its columns are kept or its rows: products that agree share what is gathered."""
    return matrix_of(argument(linear, 1, "weight")), linear in region.sinks


def everything_prices(region: Region) -> Prices:
    """Prices under which the cut computes compact all that can be: matrix products first, then copies saved."""
    value = {node: 10**6 if is_product(node) else 0 for node in region.nodes}
    value |= {node: 10**3 for node in region.sinks if not is_product(node)}
    read = {value: 1 for node in region.nodes for value in (node, *region.wants.get(node, {}))}
    return Prices(dict.fromkeys(region.nodes, 0), value, read, read)


def _labels(
    region: Region, node: fx.Node, keep: float, others: Keeps, costs: DeviceCosts, groups: int, sharing: int
) -> tuple[int, int]:
    elements, itemsize = _size(node)
    if multiplies(node):
        keep_in, keep_out = others(node)
        dense = layer_time(node, Share(keep_in, keep_out), costs, itemsize)
        if node in region.sinks:
            keep_in = keep
        else:
            keep_out = keep
        share = Share(keep_in, keep_out, groups, sharing)
        return _nanoseconds(layer_time(node, share, costs, itemsize)), _nanoseconds(dense)
    if node.target is ops.recurrence_op:
        times = recurrent_times(node, keep if node in region.sinks else 1.0, costs)
        return _nanoseconds(times[1]), _nanoseconds(times[0])
    if node is region.site:
        kept, dense = _site_times(node, keep, costs)
        return _nanoseconds(kept), _nanoseconds(dense)
    if node in region.sinks:
        assert op_name(node) in SUMS, node
        kept, dense = _residual_times(elements, itemsize, keep, costs)
        return _nanoseconds(kept), _nanoseconds(dense)
    if is_costly(node):  # a depthwise convolution
        kept, dense = (_of_its_own(node, costs, itemsize) * share for share in (keep, 1.0))
        return _nanoseconds(costs.gathered + kept), _nanoseconds(dense)
    each = 2 * (1 + len(region.wants.get(node, {})))
    fixed = costs.gathered if op_name(node) in GEMMS else 0.0
    return (
        _nanoseconds(fixed + costs.move(elements * keep, itemsize, each)),
        _nanoseconds(costs.move(elements, itemsize, each)),
    )


def _site_times(site: fx.Node, keep: float, costs: DeviceCosts) -> tuple[float, float]:
    """Seconds of a dropout, rewritten and as written."""
    elements, itemsize = _size(site)
    kept = costs.draw + 2 * costs.move(elements * keep, itemsize)
    axis, value = DROPOUT_FUNCTIONS.get(site.target, -1), value_of(site)
    numbers = elements if axis == -1 or value is None else math.prod(value.shape[: value.dim() + axis + 1])
    return kept, costs.dropout(elements, itemsize, numbers)


def _residual_times(elements: int, itemsize: int, keep: float, costs: DeviceCosts) -> tuple[float, float]:
    """Seconds of a sum that adds the kept units alone, and of one that adds all."""
    kept = costs.gathered + costs.move(elements, itemsize) + 2 * costs.move(elements * keep, itemsize)
    return kept, costs.move(elements, itemsize, 3)


def step_times(graph: fx.Graph, context: Context) -> tuple[float, float]:
    """Seconds of forward and backward by the table: as written, and as planned; the optimizer's are not in it.

    What is between the two is shared out among the sites: of a product between two of them each has a half.
    """
    written = planned = 0.0
    converted = set[tuple[fx.Node, Form | None]]()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        times = node_times(node, context)
        written, planned = written + times[0], planned + times[1]
        around = sites_of(node)
        for index in around:
            context.sites[index].seconds_saved += (times[0] - times[1]) / len(around)
        reads = notes(node).get("reads", {})
        for operand in node.all_input_nodes:
            have, want = notes(operand).get("form"), reads.get(operand)
            for form in {have, want} - {None} if have != want else ():
                if form is not None and (operand, form) not in converted:
                    converted.add((operand, form))
                    elements, itemsize = _size(operand)
                    keep = kept_share(form, context)
                    moved = context.costs.move(elements * keep, itemsize) + context.costs.move(elements, itemsize)
                    planned += context.costs.gathered + moved
                    context.sites[form.site].seconds_saved -= context.costs.gathered + moved
    return written, planned


def node_times(node: fx.Node, context: Context) -> tuple[float, float]:
    """Seconds of one operation, as written and as planned, without conversions."""
    costs, (elements, itemsize) = context.costs, _size(node)
    reads, makes = forms_of(node)
    keep_in, keep_out = kept_share(reads, context), kept_share(makes, context)
    if multiplies(node):
        groups = max([context.sites[form.site].groups for form in (reads, makes) if form is not None], default=1)
        return (
            layer_time(node, Share(), costs, itemsize),
            layer_time(node, Share(keep_in, keep_out, groups), costs, itemsize),
        )
    if node.target is ops.recurrence_op:
        as_written, kept = recurrent_times(node, keep_in, costs)
        return as_written, kept if reads is not None else as_written
    passes = 1 + sum(value_of(o) is not None for o in node.all_input_nodes)
    passes *= 2 if notes(node).get("asks_gradient") else 1
    if op_name(node) in _FREE or elements == 0:
        return 0.0, 0.0
    if is_costly(node):
        time = _of_its_own(node, costs, itemsize)
        return time, time * keep_out
    if drops(node):
        kept, dense = _site_times(node, keep_out, costs)
        return dense, kept if makes is not None else dense
    fixed = costs.gathered if op_name(node) in GEMMS and makes is not None else 0.0
    if reads is not None and makes is None:  # a sum that adds the kept units alone
        kept, dense = _residual_times(elements, itemsize, keep_in, costs)
        return dense, kept
    return costs.move(elements, itemsize, passes), fixed + costs.move(elements * keep_out, itemsize, passes)


_FREE = frozenset([*COPIES, *PERMUTATIONS, *RESHAPES, "getitem", "size", "expand", "expand_as", "select", *SPLITS])
"""Views, and what is free as far as it is one."""
_ATTENTION = "scaled_dot_product_attention"
_MATMULS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", _ATTENTION)


def is_costly(node: fx.Node) -> bool:
    """Whether a node multiplies matrices, or computes as much."""
    return op_name(node) in (*_MATMULS, *ALL_CONVOLUTIONS, "linear")


def products_flops(node: fx.Node) -> int:
    """FLOPs of its matrix products, forward and backward; 0 for what multiplies none."""
    if multiplies(node):
        m, n, k, products = products_of(node)
        return 2 * m * n * k * products
    return 3 * sum(2 * m * n * k for m, n, k in _products(node)) if is_costly(node) else 0


def _of_its_own(node: fx.Node, costs: DeviceCosts, itemsize: int) -> float:
    """Seconds of the products of what is no layer that multiplies, forward and backward."""
    return 3 * sum(costs.gemm(m, n, k, itemsize) for m, n, k in _products(node))


def _products(node: fx.Node) -> list[tuple[int, int, int]]:
    """(M, N, K) of the matrix products that an operation amounts to, forward."""
    values = [value for o in node.all_input_nodes if (value := value_of(o)) is not None]
    elements, last = _size(node)[0], max(_size_of_last(node), 1)
    if op_name(node) in ALL_CONVOLUTIONS and len(values) > 1:
        channels = max(value_of(node).size(1), 1)  # type: ignore[union-attr]
        return [(elements // channels, channels, values[1].numel() // channels)]
    if op_name(node) == _ATTENTION and len(values) > 2:
        query, key, value = values[:3]
        rows, seen = query.numel() // max(query.size(-1), 1), key.size(-2)
        return [(rows, seen, query.size(-1)), (rows, value.size(-1), seen)]
    return [(elements // last, last, max((v.size(-1) for v in values), default=1))]


def kept_share(form: Form | None, context: Context) -> float:
    """Of the units that a form keeps; 1 where dense."""
    fit = None if form is None else context.sites[form.site].fit
    return 1.0 if fit is None else fit.keep


def _size_of_last(node: fx.Node) -> int:
    value = value_of(node)
    return 1 if value is None or value.dim() == 0 else int(value.size(-1))


def lowered_times(node: fx.Node, keep_in: float, keep_out: float, costs: DeviceCosts) -> dict[str, float]:
    """Seconds of a gathered Linear, forward and backward, by lowering: copies and BLAS, or a gather in the product."""
    m, n, k, products = products_of(node)
    itemsize = _size(node)[1]
    product = costs.gemm(m, n * keep_out, k * keep_in, itemsize)
    fused = costs.launch + (product - costs.launch) / costs.fused
    return {"aten": layer_time(node, Share(keep_in, keep_out), costs, itemsize), "triton": products * fused}


def tiled_times(site: fx.Node, linears: Sequence[fx.Node], keep: float, costs: DeviceCosts) -> tuple[float, float]:
    """Seconds of a dropout and the Linears that read it, as written and with tiles of their weights dropped."""
    elements, itemsize = _size(site)
    dense, tiled = costs.dropout(elements, itemsize), 0.0
    for linear in linears:
        m, n, k, products = products_of(linear)
        dense += products * costs.gemm(m, n, k, itemsize)
        classes = round(1 / keep)
        tiled += classes * products * costs.gemm(m, n * keep, k * keep, itemsize)
        # input and output brought into the order of the classes and back, kept tiles gathered, their gradient put
        tiled += 2 * costs.move(m * (n + k), itemsize)
        tiled += 2 * classes * costs.move(n * k * keep * keep, itemsize) + costs.move(n * k, itemsize, 1)
    return dense, tiled


def _size(node: fx.Node) -> tuple[int, int]:
    value = notes(node).get("val")
    return (math.prod(value.shape), value.element_size()) if isinstance(value, Tensor) else (0, 4)


def _nanoseconds(seconds: float) -> int:
    return max(int(seconds * 1e9), 1)
