"""Views: an axis may move, merge with axes after it, or be one of several results'."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from dropfx.graph.axis_rules.pointwise import first_operand
from dropfx.graph.axis_rules.rule import Operands
from dropfx.graph.nodes import op_name, parts_of, value_of
from dropfx.graph.notes import UnitAxis


def reshape_axis(source: Sequence[int], target: Sequence[int], axis: UnitAxis) -> UnitAxis | None:
    """Axis of `target` that holds `axis` of `source` when one shape is viewed as the other.

    The axis may merge with axes after it (its factor grows); it may not be split or merge with axes before it.
    """
    position = len(source) + axis.dim
    for merged in range(position + 1, len(source) + 1):
        length, behind = math.prod(source[position:merged]), math.prod(source[merged:])
        for place, size in enumerate(target):
            if size == length and size > 1 and math.prod(target[place + 1 :]) == behind:
                return UnitAxis(place - len(target), axis.factor * (length // source[position]))
    return None


def reshape_operands(node: fx.Node, axis: UnitAxis) -> Operands | None:
    """Axis of the operand that a reshape shows as `axis` of its output; None where it is split or merged otherwise."""
    first, out = node.args[0], value_of(node)
    value = value_of(first)
    if not isinstance(first, fx.Node) or value is None or out is None or _squeezes_any(node):
        return None
    if (found := reshape_axis(out.shape, value.shape, axis)) is not None:
        return {first: found}
    for dim in range(-value.dim(), 0):  # one that it merges with axes behind it
        merged = reshape_axis(value.shape, out.shape, UnitAxis(dim))
        if merged is not None and merged.dim == axis.dim and axis.factor % merged.factor == 0:
            return {first: UnitAxis(dim, axis.factor // merged.factor)}
    return None


def _squeezes_any(node: fx.Node) -> bool:
    # a compact axis may have width 1, which squeeze() without a dimension would take away
    return op_name(node) == "squeeze" and len(node.args) + len(node.kwargs) == 1


def reshape_output(node: fx.Node, operand: fx.Node, axis: UnitAxis) -> UnitAxis | None:
    """Axis of the output that holds the operand's `axis`; None where the reshape splits it or merges it with others."""
    value, out = value_of(operand), value_of(node)
    if value is None or out is None or operand is not node.args[0] or _squeezes_any(node):
        return None
    return reshape_axis(value.shape, out.shape, axis)


def axes_of_permutation(node: fx.Node) -> list[int] | None:
    """Which input axis each output axis of a permutation is: read off a tensor whose sizes all differ."""
    value = value_of(node.args[0])
    if value is None:
        return None
    probe = torch.empty(tuple(range(2, 2 + value.dim())), device="meta")
    rest = node.args[1:]
    if node.op == "call_method":
        out = getattr(probe, str(node.target))(*rest, **node.kwargs)
    else:
        out = node.target(probe, *rest, **node.kwargs)  # type: ignore[operator]
    return [size - 2 for size in out.shape]


def permute_operands(node: fx.Node, axis: UnitAxis) -> Operands | None:
    """Axis of the operand that a permutation moves to `axis` of its output; None where the order is not known."""
    order, first = axes_of_permutation(node), node.args[0]
    if order is None or not isinstance(first, fx.Node):
        return None
    return {first: UnitAxis(order[axis.dim] - len(order), axis.factor)}


def permute_output(node: fx.Node, operand: fx.Node, axis: UnitAxis) -> UnitAxis | None:
    """Axis of the output to which a permutation moves the operand's `axis`; None where the order is not known."""
    order = axes_of_permutation(node)
    if order is None:
        return None
    return UnitAxis(order.index(len(order) + axis.dim) - len(order), axis.factor)


def first_stays(node: fx.Node) -> bool:
    """Whether a permutation leaves the first axis the first one."""
    order = axes_of_permutation(node)
    return order is not None and order[:1] == [0]


def axes_of_index(node: fx.Node) -> list[int | None] | None:
    """Which input axis each output axis of x[index] is, None for new or cut axes; None if it indexes by tensors."""
    value, index = value_of(node.args[0]), node.args[1]
    if value is None:
        return None
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (i is None or i is Ellipsis or type(i) in (int, slice)) for i in items):
        return None
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    if Ellipsis not in items:
        items.append(Ellipsis)
    order: list[int | None] = []
    dim = 0
    for item in items:
        if item is Ellipsis:
            order += range(dim, dim + value.dim() - used)
            dim += value.dim() - used
        elif item is None:
            order.append(None)
        else:
            if isinstance(item, slice):
                order.append(dim if item == slice(None) else None)
            dim += 1
    return order


def index_operands(node: fx.Node, axis: UnitAxis) -> Operands | None:
    """Axis of the operand that `x[...]` shows as `axis` of its output; None where the index is not known."""
    if _part_of_several(node):
        return first_operand(node, axis)
    order, first = axes_of_index(node), node.args[0]
    value = value_of(first)
    source = None if order is None else order[axis.dim]
    if source is None or value is None or not isinstance(first, fx.Node):
        return None
    return {first: UnitAxis(source - value.dim(), axis.factor)}


def index_output(node: fx.Node, operand: fx.Node, axis: UnitAxis) -> UnitAxis | None:
    """Axis of the output that shows the operand's `axis` whole; None where the index takes parts of it."""
    if _part_of_several(node):
        return axis
    order, value = axes_of_index(node), value_of(operand)
    if order is None or value is None or operand is not node.args[0] or value.dim() + axis.dim not in order:
        return None
    return UnitAxis(order.index(value.dim() + axis.dim) - len(order), axis.factor)


def index_keeps_first(node: fx.Node) -> bool:
    """Whether `x[...]` takes the first axis whole and leaves it the first one."""
    order = axes_of_index(node)
    return _part_of_several(node) or (order is not None and order[:1] == [0])


def _part_of_several(node: fx.Node) -> bool:
    """One result of chunk, split or unbind: its axis is named by what made it."""
    return parts_of(node.args[0]) is not None
