"""Masks of whole rows: one random value a sample, by which a branch is multiplied.

Libraries draw it in several ways: bernoulli, a dropout of ones, floor(keep + rand), rand < keep. What a chain of
operations makes of its random numbers is found by running it on some: the mask must take two values, 0 and another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dropfx.graph.axis_rules import RESHAPES
from dropfx.graph.dropout_ops import UNIFORM, Call
from dropfx.graph.nodes import argument, op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.op_families import DIVISIONS, MULTIPLICATIONS
from dropfx.planning.fills import probability


@dataclass
class RowMask:
    """x * mask, or what computes the same.

    Attributes:
        call: what draws the mask.
        product: the node that drops, with numbers that the result is multiplied by.
        x: what it drops rows of, before it is multiplied by numbers.
        body: from x's reader to the product.
        chain: from the random numbers to the mask, in the order of the graph.
        rate: the probability that a row is dropped.
        value: of the mask for a kept row.
        kept: what kept rows are multiplied by in all, from x to the product.
        whole: what rows are multiplied by where nothing drops: `kept` without the compensation for dropped ones.
        dim: the axis of the samples in x, counted from the front; None where one value drops all of them.
    """

    call: Call
    product: fx.Node
    x: fx.Node
    body: list[fx.Node]
    chain: list[fx.Node]
    rate: float
    value: float
    kept: float
    whole: float
    dim: int | None


def row_masks(graph: fx.Graph) -> Iterator[RowMask]:
    """The masks of rows in a graph, each as the graph is by then: a site may be part of another one's branch."""
    for node in list(graph.nodes):
        if (mask := _row_mask(node)) is not None:
            yield mask


def _row_mask(source: fx.Node) -> RowMask | None:
    drawn, value = _drawn(source), value_of(source)
    if drawn is None or value is None or sum(size != 1 for size in value.shape) > 1 or "pinned" in notes(source):
        return None
    outcomes, measure = drawn
    chain, mask = [source], source
    while (step := _next(mask, outcomes)) is not None:
        mask, outcomes = step
        chain.append(mask)
    readers = [user for user in mask.users if op_name(user) != "size"]
    product = readers[0] if len(readers) == 1 else None
    found = None if product is None else _product(product, mask)
    if product is None or found is None or "pinned" in notes(product):
        return None
    levels = sorted(set(outcomes.tolist()))
    if len(levels) != 2 or levels[0] != 0 or not math.isfinite(levels[1]):
        return None
    rate = measure(outcomes != 0, chain)
    if rate is None:
        return None
    (x, at), factors, body = found, [], [product]
    divided = argument(x, 0, "input")
    if len(x.users) == 1 and (factor := _factor(x, divided)) is not None and "pinned" not in notes(divided):
        factors.append(factor)
        body.insert(0, x)
        x = divided
    while len(product.users) == 1 and (factor := _factor(next(iter(product.users)), product)) is not None:
        factors.append(factor)
        product = next(iter(product.users))
        body.append(product)
    kept, whole = levels[1] * math.prod(factors), math.prod(factors)
    if levels[1] == 1 and any(math.isclose(factor * (1 - rate), 1, rel_tol=1e-6) for factor in factors):
        whole *= 1 - rate
    return RowMask(_call(source), product, x, body, chain, rate, levels[1], kept, whole, at)


def _factor(node: fx.Node, operand: Any) -> float | None:
    """What a node multiplies its operand by; None where it is another operation."""
    name, value, before = op_name(node), value_of(node), value_of(operand)
    if name not in (*MULTIPLICATIONS, *DIVISIONS) or len(node.args) != 2 or node.kwargs or "pinned" in notes(node):
        return None
    number = node.args[1]
    if node.args[0] is not operand or not isinstance(number, (int, float)) or not number:
        return None
    if value is None or before is None or value.dtype != before.dtype:
        return None
    return float(number) if name in MULTIPLICATIONS else 1 / number


def _call(source: fx.Node) -> Call:
    site = notes(source).get("site")
    return notes(source).get("bernoulli", Call(source.name)) if site is None else site.call


# -- the random numbers ---------------------------------------------------------------------------------------------

Measure = Callable[[Tensor, list[fx.Node]], float | None]
"""(outcomes that keep a row, chain) -> the probability that a row is dropped; None where that is not known."""


def _drawn(source: fx.Node) -> tuple[Tensor, Measure] | None:
    """Some numbers that a random operation may make, and what tells their probability."""
    name, value = op_name(source), value_of(source)
    if value is None or not value.is_floating_point():
        return None
    if name == "bernoulli":
        keep, _ = probability(source)
        return None if keep is None or keep == 1 else _two_levels(1.0, keep)
    if source.target is F.dropout and argument(source, 2, "training", True) is True:
        rate, ones = argument(source, 1, "p", 0.5), argument(source, 0, "input")
        if op_name(ones) in ("ones", "new_ones", "ones_like") and isinstance(rate, (int, float)) and 0 < rate < 1:
            return _two_levels(1 / (1 - rate), 1 - rate)
    if name in UNIFORM and "generator" not in source.kwargs:
        points = torch.linspace(0, 1, _POINTS + 1, dtype=value.dtype)[:-1]
        return points, _threshold
    return None


_POINTS = 1024


def _two_levels(kept: float, keep: float) -> tuple[Tensor, Measure]:
    rate = round(1 - keep, 12)  # 1 - (1 - 0.3) is not 0.3
    return torch.tensor(
        [0.0, kept], dtype=torch.float64
    ), lambda keeps, chain: rate if keeps.tolist() == [False, True] else None


def _threshold(keeps: Tensor, chain: list[fx.Node]) -> float | None:
    """Of numbers in [0, 1): operations of one are monotone, so that one threshold tells kept from dropped."""
    if (keeps[1:] != keeps[:-1]).sum() != 1:
        return None
    value, high = value_of(chain[0]), bool(keeps[-1])
    assert value is not None
    low, top = 0.0, 1.0 - 1.0 / _POINTS
    while top - low > _RESOLUTION:
        middle = (low + top) / 2
        kept = _keeps(chain, torch.tensor([middle], dtype=value.dtype))
        low, top = (low, middle) if kept is high else (middle, top)
    rate = low if high else 1 - low
    numbers = [a for node in chain for a in (*node.args, *node.kwargs.values()) if isinstance(a, float) and 0 < a < 1]
    named = [number for a in numbers for number in (a, 1 - a)]
    # a number of the program, of which 24 bits or fewer are left where it is compared
    nearest = min(named, key=lambda number: abs(number - rate), default=rate)
    allowed = max(2 * _RESOLUTION, torch.finfo(value.dtype).eps)
    return round(nearest if abs(nearest - rate) <= allowed else rate, 12)


_RESOLUTION = 2.0**-26


def _keeps(chain: list[fx.Node], point: Tensor) -> bool:
    """Whether a chain keeps a row for which its random number is this one."""
    for node, operand in zip(chain[1:], chain, strict=False):
        point = _apply(node, operand, point)
    return bool(point != 0)


# -- the chain ------------------------------------------------------------------------------------------------------

_SHAPES = (*RESHAPES, "expand", "expand_as", "detach", "contiguous", "clone")
_CASTS = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "bool", "int", "long")
_OF_NUMBERS = (
    *("add", "sub", "subtract", *MULTIPLICATIONS, *DIVISIONS, "lt", "le", "gt", "ge", "floor", "ceil", "round"),
    *("logical_not", "bitwise_not", "invert"),
)
"""Monotone in their one operand, whatever the numbers beside it."""


def _next(node: fx.Node, outcomes: Tensor) -> tuple[fx.Node, Tensor] | None:
    """The one reader of a step of the chain, where it is a step too, and what it makes of the outcomes."""
    readers = [user for user in node.users if op_name(user) != "size"]
    if len(readers) != 1 or "pinned" in notes(readers[0]):
        return None
    (user,) = readers
    name = op_name(user)
    if name in (*_SHAPES, "getitem") and user.args[:1] == (node,):
        value, before = value_of(user), value_of(node)
        expanded = value is None or before is None or value.numel() != before.numel()
        return None if expanded else (user, outcomes)
    if name in _CASTS and user.args[:1] == (node,):
        return user, _apply(user, node, outcomes)
    others = [a for a in (*user.args, *user.kwargs.values()) if a is not node]
    if name in _OF_NUMBERS and all(isinstance(a, (int, float)) for a in others) and len(user.all_input_nodes) == 1:
        return user, _apply(user, node, outcomes)
    return None


def _apply(step: fx.Node, operand: fx.Node, outcomes: Tensor) -> Tensor:
    """The step's results for the outcomes in its operand's place."""
    name, value = op_name(step), value_of(step)
    assert value is not None
    if name in (*_SHAPES, "getitem"):
        return outcomes
    if name in _CASTS:
        return outcomes.to(value.dtype)
    args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda node: outcomes)
    if step.op == "call_method":
        made: Tensor = getattr(args[0], str(step.target))(*args[1:], **kwargs)
        return made
    return step.target(*args, **kwargs)  # type: ignore[operator, no-any-return]


# -- what it drops --------------------------------------------------------------------------------------------------


def _product(node: fx.Node, mask: fx.Node) -> tuple[fx.Node, int | None] | None:
    """What a node drops rows of, and the axis of these; None where it is no product with the mask."""
    name = op_name(node)
    x: Any = None
    if name in MULTIPLICATIONS and len(node.args) == 2 and not node.kwargs:
        x = node.args[1] if node.args[0] is mask else node.args[0]
    elif name == "where" and len(node.args) == 3 and node.args[0] is mask and node.args[2] in (0, 0.0):
        x = node.args[1]
    value, drawn, made = value_of(x), value_of(mask), value_of(node)
    if value is None or drawn is None or made is None or not isinstance(x, fx.Node) or x is mask:
        return None
    if made.shape != value.shape or made.dtype != value.dtype or not value.is_floating_point():
        return None
    axes = [value.dim() - drawn.dim() + d for d, size in enumerate(drawn.shape) if size != 1]
    if not axes:
        return (x, None) if value.dim() > 1 and value.numel() > 1 else None
    (dim,) = axes
    return (x, dim) if dim < value.dim() - 1 and value.size(dim) == drawn.numel() else None
