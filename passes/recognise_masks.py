"""x * (new_empty(B, 1, F).bernoulli_(1-p) / (1-p)) -> shared_dropout(x, p)        a site like any other dropout
mask = bernoulli(full(.., 1-p)) / (1-p);  x * mask;  y * mask -> mask = shared_dropout(ones, p);  x * mask;  y * mask

AWD-LSTM, and much that was written after it, draws one mask for all time steps by hand; Gal's variational LSTM
multiplies the state of every step by it. A mask of one product becomes a dropout of what it multiplies, one of several
products a dropout of ones, after which each product is a reader of the same site. Either computes what the chain did
where no pattern takes its place.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, fx

from dropfx.graph.dropout_ops import Call
from dropfx.graph.emit import Emitter, fake_value
from dropfx.graph.nodes import insert, memory_order, op_name, value_of
from dropfx.graph.notes import Dropping, notes
from dropfx.graph.op_families import DIVISIONS, MULTIPLICATIONS
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.ops.shared_dropout import shared_dropout
from dropfx.planning.fills import probability

_EXPANSIONS = ("expand", "expand_as")
_BROADCASTS = (*_EXPANSIONS, "unsqueeze", "detach")


def recognise_masks(module: fx.GraphModule, context: Context) -> PassResult:
    """Replace the masks of which nothing but products of units are made."""
    modified = False
    for node in list(module.graph.nodes):
        if op_name(node) == "bernoulli":
            modified |= _recognise(node)
    return PassResult(module, modified)


class _Product(NamedTuple):
    """x * mask, and of each axis of x, whether all positions share the mask."""

    node: fx.Node
    x: fx.Node
    shared: tuple[bool, ...]


class _Mask(NamedTuple):
    """What a draw becomes: the nodes from the draw to the products, in the order of the graph, and the products."""

    nodes: list[fx.Node]
    products: list[_Product]


def _recognise(draw: fx.Node) -> bool:
    keep, filled = probability(draw)
    mask = None if keep is None else _mask(draw, keep)
    if keep is None or mask is None:
        return False
    order = _order(draw)
    if order is not None and any(value_of(product.x).dim() != len(order) for product in mask.products):  # type: ignore[union-attr]
        return False  # its axes are others in the product
    rate = round(1 - keep, 12)  # 1 - (1 - 0.3) is not 0.3
    if len(mask.products) == 1:
        (product,) = mask.products
        with draw.graph.inserting_before(product.node):
            call = product.x, rate, product.shared, filled, order
            site = insert(draw.graph, shared_dropout, call, like=product.node)
        product.node.replace_all_uses_with(site)
        erased = [*mask.nodes, product.node]
    else:
        shared = _shared_by_all(draw, mask.products)
        with draw.graph.inserting_before(draw):
            site = insert(draw.graph, shared_dropout, (_ones(draw), rate, shared, filled, order), like=draw)
        del notes(site)["bernoulli"]
        erased = _without_scale(mask.nodes, site)
    notes(site)["site"] = Dropping(notes(draw).get("bernoulli", Call(site.name)), rate)
    for node in reversed(erased):  # a draw would stay though nobody reads it
        draw.graph.erase_node(node)
    return True


def _order(draw: fx.Node) -> tuple[int, ...] | None:
    """The axes of a draw as they lie in memory, which is how a mask is filled in place; None where in their order."""
    value = value_of(draw)
    return None if value is None or value.is_contiguous() else memory_order(value)


def _mask(draw: fx.Node, keep: float) -> _Mask | None:
    """The mask that begins with a draw; None where anything else is made of it, or it is divided by anything else."""
    nodes, products = set[fx.Node](), dict[fx.Node, _Product | None]()
    pending: list[tuple[fx.Node, float, bool]] = [(draw, 1.0, False)]
    while pending:
        node, scale, expanded = pending.pop()
        nodes.add(node)
        if "pinned" in notes(node):
            return None
        for user in node.users:
            factor = _factor(user, node)
            if factor is None:
                # given a mask twice, it is no product of one
                products[user] = _product(user, node) if user not in products else None
                if products[user] is None or not math.isclose(scale * keep, 1, rel_tol=1e-6):
                    return None
            elif expanded and op_name(user) == "unsqueeze":
                return None  # the axes that it names may be others without the expansion
            else:
                pending.append((user, scale * factor, expanded or op_name(user) in _EXPANSIONS))
    found = [product for product in products.values() if product is not None]
    if not found or any(product.x in nodes for product in found):
        return None
    return _Mask([node for node in draw.graph.nodes if node in nodes], found)


def _factor(node: fx.Node, mask: fx.Node) -> float | None:
    """What a node multiplies a mask by, all its values alike; None where it is another operation."""
    name = op_name(node)
    if name in _BROADCASTS and node.args[:1] == (mask,) and mask not in node.args[1:]:
        return 1.0
    if len(node.args) != 2 or node.kwargs or name not in (*MULTIPLICATIONS, *DIVISIONS):
        return None
    first, second = node.args
    number = second if first is mask else first if name in MULTIPLICATIONS else None
    if not isinstance(number, (int, float)) or not number:
        return None
    return number if name in MULTIPLICATIONS else 1 / number


def _product(node: fx.Node, mask: fx.Node) -> _Product | None:
    """The product of a mask and another value, of which it drops units."""
    if op_name(node) not in MULTIPLICATIONS or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    x = second if first is mask else first
    shared = _shared(value_of(x), value_of(mask), value_of(node))
    return None if shared is None or not isinstance(x, fx.Node) else _Product(node, x, shared)


def _shared(x: Tensor | None, mask: Tensor | None, product: Tensor | None) -> tuple[bool, ...] | None:
    """Of each axis of x, whether all positions share the mask; None where the product is no dropout of its units."""
    if x is None or mask is None or product is None or not x.is_floating_point() or not x.dim():
        return None
    if product.shape != x.shape or mask.dtype != x.dtype or mask.device != x.device:
        return None
    missing = x.dim() - mask.dim()
    sizes = zip(mask.shape, x.shape[missing:], mask.stride(), strict=True)
    own = [False] * missing + [m == n and (stride != 0 or n == 1) for m, n, stride in sizes]  # 0: it was expanded
    # rows whose units share one value are for `skip_rows`
    return tuple(not axis for axis in own) if own[-1] or any(own[1:]) else None


# -- one mask of several products -----------------------------------------------------------------------------------


def _shared_by_all(draw: fx.Node, products: list[_Product]) -> tuple[bool, ...]:
    """Of each axis of a draw, whether it has one position for several of a product."""
    sizes, lone = notes(draw)["val"].shape, all(value_of(p.node).size(0) == 1 for p in products)  # type: ignore[union-attr]
    return tuple(size == 1 and not (axis == 0 and lone) for axis, size in enumerate(sizes))


def _ones(draw: fx.Node) -> fx.Node:
    """Ones of a draw's shape, which read nothing of the tensor after which the model shaped its draw."""
    value, source, emit = value_of(draw), draw.args[0], Emitter(draw)
    assert value is not None
    sizes = [emit("size", source, axis) for axis in range(value.dim())]
    with draw.graph.inserting_before(draw):
        ones = draw.graph.call_function(torch.ones, (sizes,), {"dtype": value.dtype, "device": value.device})
    ones.meta = {**sizes[0].meta, "val": fake_value("new_ones", value, tuple(value.shape))}
    return ones


def _without_scale(nodes: list[fx.Node], site: fx.Node) -> list[fx.Node]:
    """Let the products read the site's mask in place of the draw's, which is scaled by then; the nodes to erase.

    Products broadcast by themselves: an expansion would name the width of all units. A new axis stays.
    """
    erased: list[fx.Node] = []
    for node in nodes:
        if op_name(node) == "unsqueeze":
            notes(node)["val"] = fake_value("unsqueeze", notes(node.args[0])["val"], *node.args[1:])
            continue
        node.replace_all_uses_with(node.all_input_nodes[0] if erased else site)
        erased.append(node)
    return erased
