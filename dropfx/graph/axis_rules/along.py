"""Operations along another axis than the units': parts, sums, orders."""

from __future__ import annotations

from typing import Any

from torch import fx

from dropfx.graph.axis_rules.rule import AxisRule, Operands, Zero
from dropfx.graph.nodes import argument, op_name, value_of
from dropfx.graph.notes import UnitAxis
from dropfx.graph.op_families import CATS, SPLITS

DIM: dict[str, tuple[int, str, Any]] = {
    **dict.fromkeys(("narrow", "select", "index_select", "cumsum"), (1, "dim", None)),
    **dict.fromkeys(SPLITS, (2, "dim", 0)),
    "unbind": (1, "dim", 0),
    **dict.fromkeys(("flip", "sum", "mean", "amax", "amin"), (1, "dim", None)),
    "roll": (2, "dims", None),
    **dict.fromkeys(("softmax", "log_softmax"), (1, "dim", None)),
    **dict.fromkeys(CATS, (1, "dim", 0)),
}
"""Operations along an axis -> place, name and default of the argument that names it (or several)."""
_REDUCTIONS = ("sum", "mean", "amax", "amin")


def _along(node: fx.Node, rank: int) -> list[int] | None:
    """The axes, counted from the front, along which the operation works; None if that is not said."""
    name = op_name(node)
    position, keyword, default = DIM[name]
    dims = argument(node, position, "dims" if name == "flip" else keyword, default)
    if name == "flip" and len(node.args) > 2:  # x.flip(0, 1)
        dims = node.args[1:]
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (list, tuple)) or not dims or not all(isinstance(d, int) for d in dims):
        return None
    return [d % rank for d in dims]


def _removed(node: fx.Node, along: list[int]) -> list[int]:
    """Those of the axes that the result lacks."""
    name = op_name(node)
    lost = name in ("select", "unbind") or (name in _REDUCTIONS and not argument(node, 2, "keepdim", False))
    return along if lost else []


def _along_sources(node: fx.Node) -> list[fx.Node]:
    first = node.args[0] if node.args else None
    sources = list(first) if isinstance(first, (list, tuple)) else [first]
    return [s for s in sources if isinstance(s, fx.Node)]


def _along_operands(node: fx.Node, axis: UnitAxis) -> Operands | None:
    sources = _along_sources(node)
    values = [value_of(source) for source in sources]
    if not values or any(v is None for v in values):
        return None
    rank = values[0].dim()  # type: ignore[union-attr]
    along = _along(node, rank)
    if along is None:
        return None
    removed = _removed(node, along)
    kept = [d for d in range(rank) if d not in removed]
    source = kept[axis.dim]
    return None if source in along else dict.fromkeys(sources, UnitAxis(source - rank, axis.factor))


def _along_output(node: fx.Node, operand: fx.Node, axis: UnitAxis) -> UnitAxis | None:
    value = value_of(operand)
    along = None if value is None else _along(node, value.dim())
    if value is None or along is None or operand not in _along_sources(node) or value.dim() + axis.dim in along:
        return None
    behind = sum(d > value.dim() + axis.dim for d in _removed(node, along))
    return UnitAxis(axis.dim + behind, axis.factor)


def _along_keeps_first(node: fx.Node) -> bool:
    value = next(map(value_of, _along_sources(node)), None)
    along = None if value is None else _along(node, value.dim())
    return along is not None and 0 not in along


def along_rule(zero: Zero) -> AxisRule:
    """The row of an operation in `DIM`; `zero`: where its result is 0 at dropped units, as in `AxisRule`."""
    return AxisRule(_along_operands, _along_output, zero, _along_keeps_first, moves_rows=True)


def _stacked(node: fx.Node) -> tuple[int, int] | None:
    """(new axis of a stack, counted from the front; rank of its operands)."""
    value, dim = value_of(node), argument(node, 1, "dim", 0)
    return None if value is None or not isinstance(dim, int) else (dim % value.dim(), value.dim() - 1)


def stack_operands(node: fx.Node, axis: UnitAxis) -> Operands | None:
    """The stacked tensors, compact along the axis that the result's axis was; None along the new axis."""
    found, sources = _stacked(node), _along_sources(node)
    if found is None or not sources:
        return None
    new, rank = found
    place = rank + 1 + axis.dim
    return None if place == new else dict.fromkeys(sources, UnitAxis(place - (place > new) - rank, axis.factor))


def stack_output(node: fx.Node, operand: fx.Node, axis: UnitAxis) -> UnitAxis | None:
    """The axis of the result that an axis of a stacked tensor becomes."""
    found = _stacked(node)
    if found is None or operand not in _along_sources(node):
        return None
    new, rank = found
    place = rank + axis.dim
    return UnitAxis(place + (place >= new) - rank - 1, axis.factor)


def stack_keeps_first(node: fx.Node) -> bool:
    """Whether the first axis of the result is that of the stacked tensors."""
    found = _stacked(node)
    return found is not None and found[0] != 0


def all_sources(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Zero where all tensors that the operation reads are: sums, parts and orders of zeros are zeros."""
    return zeros.issuperset(_along_sources(node))
