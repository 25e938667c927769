"""Element by element: operands broadcast; and casts and copies, which follow their first operand."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from dropfx.graph.axis_rules.rule import AxisRule, Operands, Zero
from dropfx.graph.nodes import argument, value_of
from dropfx.graph.notes import UnitAxis, notes


def pointwise_operands(node: fx.Node, axis: UnitAxis) -> Operands | None:
    """The operands that are as long as the output on the axis; the others broadcast there."""
    return broadcast_operands(node.all_input_nodes, node, axis)


def broadcast_operands(operands: Iterable[fx.Node], node: fx.Node, axis: UnitAxis) -> Operands | None:
    """Those of the operands that are as long as the output on the axis; None where one has another length."""
    out = value_of(node)
    if out is None:
        return None
    found: Operands = {}
    for operand in operands:
        value = notes(operand).get("val")
        if not isinstance(value, torch.Tensor):
            if isinstance(value, (bool, int, float)):
                continue
            return None
        if value.dim() >= -axis.dim and value.shape[axis.dim] == out.shape[axis.dim]:
            found[operand] = axis
        elif value.dim() >= -axis.dim and value.shape[axis.dim] != 1:
            return None
    return found


def _pointwise_output(node: fx.Node, operand: fx.Node, axis: UnitAxis) -> UnitAxis | None:
    out, value = value_of(node), value_of(operand)
    if out is None or value is None or out.dim() < -axis.dim or out.shape[axis.dim] != value.shape[axis.dim]:
        return None
    return axis


def always(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Zero whenever the operand is: f(0) = 0, or a product of which one factor is 0."""
    return True


def never(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Not zero, whatever the operands are: f(0) != 0, or data decide."""
    return False


def all_operands(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Zero where both operands are: sums and differences."""
    return len(node.args) > 1 and all(isinstance(a, fx.Node) and a in zeros for a in node.args[:2])


def numerator(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Zero where the dividend is and the divisor is not: 0 / 0 is NaN."""
    return node.args[0] in zeros and not (isinstance(node.args[1], fx.Node) and node.args[1] in zeros)


def clamp_holds_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Zero where 0 lies within the bounds, as far as there are any; they must be numbers, not tensors."""
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    return all(b is None or isinstance(b, (int, float)) for b in (low, high)) and (low or 0) <= 0 <= (high or 0)


def hardtanh_holds_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Zero where 0 lies within the bounds of `hardtanh`, -1 and 1 unless given."""
    return float(argument(node, 1, "min_val", -1.0)) <= 0 <= float(argument(node, 2, "max_val", 1.0))


def power_at_least_one(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Zero where the base is and the exponent is a number >= 1, with which the slope at 0 is finite too."""
    exponent = argument(node, 1, "exponent")
    return node.args[0] in zeros and isinstance(exponent, (int, float)) and exponent >= 1


def threshold_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Zero where `threshold(x, t, value)` replaces 0, by t >= 0, and the value is 0."""
    return float(argument(node, 1, "threshold", 0.0)) >= 0 and float(argument(node, 2, "value", 0.0)) == 0


def pointwise(zero: Zero) -> AxisRule:
    """The row of an operation element by element; `zero`: where its result is 0 at dropped units."""
    return AxisRule(pointwise_operands, _pointwise_output, zero, pointwise=True)


def first_operand(node: fx.Node, axis: UnitAxis) -> Operands | None:
    """The first operand carries the axis where the output does; None where it is no value of the graph."""
    first = node.args[0]
    return {first: axis} if isinstance(first, fx.Node) else None


def first_output(node: fx.Node, operand: fx.Node, axis: UnitAxis) -> UnitAxis | None:
    """The output has the axis of its first operand; None for any other."""
    return axis if operand is node.args[0] else None
