"""What a row of the table says of an operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from dropfx.graph.notes import UnitAxis

Operands = dict[fx.Node, UnitAxis]
Zero = Callable[[fx.Node, set[fx.Node]], bool]


@dataclass(frozen=True)
class AxisRule:
    """One operation's row.

    Attributes:
        operands: (node, output axis) -> axis in each operand that carries it; None if not unit-wise there. Operands
            that broadcast along the axis are left out.
        output: (node, operand, its axis) -> axis of the output, None if it does not survive.
        zero: (node, operands that are 0 at dropped units) -> the output is 0 there too.
        leads: (node) -> the first axis of the operand is the first one of the output.
        moves_rows: the axes before the unit axis may change order or length.
        pointwise: operands broadcast against each other.
    """

    operands: Callable[[fx.Node, UnitAxis], Operands | None]
    output: Callable[[fx.Node, fx.Node, UnitAxis], UnitAxis | None]
    zero: Zero
    leads: Callable[[fx.Node], bool] = lambda node: True
    moves_rows: bool = False
    pointwise: bool = False
