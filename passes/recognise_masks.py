"""x * (new_empty(B, 1, F).bernoulli_(1-p) / (1-p)) -> shared_dropout(x, p)        a site like any other dropout

AWD-LSTM, and much that was written after it, draws one mask for all time steps by hand. The chain becomes one node,
which computes what the chain did where no pattern takes its place.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, fx

from dropfx.graphs import argument, insert, op_name, value_of
from dropfx.pass_infra import Context, PassResult
from dropfx.shared_dropout import shared_dropout

_PRODUCTS = ("mul", "multiply")
_QUOTIENTS = ("div", "truediv", "divide", "true_divide")
_BROADCASTS = ("expand", "expand_as", "unsqueeze", "detach")


def recognise_masks(module: fx.GraphModule, context: Context) -> PassResult:
    """Replace the products with such masks that nothing else reads."""
    modified = False
    for node in list(module.graph.nodes):
        if op_name(node) in _PRODUCTS and len(node.args) == 2 and not node.kwargs:
            modified |= any(_recognise(node, x, mask) for x, mask in (node.args, reversed(node.args)))
    return PassResult(module, modified)


class _Chain(NamedTuple):
    """How a mask is made: its nodes from the last one to its draw, and what its ones were multiplied by."""

    nodes: list[fx.Node]
    scale: float


def _recognise(product: fx.Node, x: Any, mask: Any) -> bool:
    chain = _chain(mask)
    if chain is None or not isinstance(x, fx.Node):
        return False
    *_, draw = chain.nodes
    keep = argument(draw, 1, "p")  # without it each unit has a probability of its own
    shared = _shared(value_of(x), value_of(mask), value_of(product))
    if not isinstance(keep, (int, float)) or not math.isclose(chain.scale * keep, 1, rel_tol=1e-6) or shared is None:
        return False
    if draw.kwargs.keys() - {"p"}:  # a generator of its own
        return False
    rate = round(1 - keep, 12)  # 1 - (1 - 0.3) is not 0.3
    graph = product.graph
    with graph.inserting_before(product):
        site = insert(graph, shared_dropout, (x, rate, shared), like=product)
    site.meta["site"] = {"name": draw.meta.get("bernoulli", site.name), "rate": rate, "live": None}
    product.replace_all_uses_with(site)
    for node in (product, *chain.nodes):  # a draw, which writes in place, would stay though nobody reads it
        graph.erase_node(node)
    return True


def _chain(mask: Any) -> _Chain | None:
    """The chain that a mask is the end of; None where it is another value, or another reader sees a part of it."""
    nodes, scale = [], 1.0
    node: Any = mask
    while isinstance(node, fx.Node) and len(node.users) == 1:
        nodes.append(node)
        name, factor = op_name(node), node.args[1] if len(node.args) == 2 else None
        if name == "bernoulli":
            return _Chain(nodes, scale)
        if name in (*_PRODUCTS, *_QUOTIENTS) and isinstance(factor, (int, float)) and factor and not node.kwargs:
            scale *= factor if name in _PRODUCTS else 1 / factor
        elif name not in _BROADCASTS:
            return None
        node = node.args[0]
    return None


def _shared(x: Tensor | None, mask: Tensor | None, product: Tensor | None) -> tuple[bool, ...] | None:
    """Of each axis of x, whether all positions share the mask; None where the product is no dropout of its units."""
    if x is None or mask is None or product is None or not x.is_floating_point() or not x.dim():
        return None
    if product.shape != x.shape or mask.dtype != x.dtype or mask.device != x.device:
        return None
    missing = x.dim() - mask.dim()
    sizes = zip(mask.shape, x.shape[missing:], mask.stride(), strict=True)
    own = [False] * missing + [m == n and (stride != 0 or n == 1) for m, n, stride in sizes]  # 0: it was expanded
    return tuple(not axis for axis in own) if own[-1] else None
