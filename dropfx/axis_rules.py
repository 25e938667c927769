"""How a unit axis passes through each operation: the table from which regions grow.

An operation is *unit-wise* on an axis when unit j of the output needs only unit j of the operands, and
*zero-preserving* when it gives 0 for units that are 0. Before a site unit-wise suffices, since dropped values are never
read; after it f(0) = 0 is needed too. Axes are counted from the end, so that broadcasting aligns them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dropfx.graphs import argument, op_name, parts_of, value_of


@dataclass(frozen=True)
class Axis:
    """Where a site's units lie in a value: axis `dim` (negative), `factor` neighbouring positions a unit."""

    dim: int
    factor: int = 1


Operands = dict[fx.Node, Axis]
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

    operands: Callable[[fx.Node, Axis], Operands | None]
    output: Callable[[fx.Node, fx.Node, Axis], Axis | None]
    zero: Zero
    leads: Callable[[fx.Node], bool] = lambda node: True
    moves_rows: bool = False
    pointwise: bool = False


# -- element by element ---------------------------------------------------------------------------------------------


def _pointwise_operands(node: fx.Node, axis: Axis) -> Operands | None:
    out = value_of(node)
    if out is None:
        return None
    found: Operands = {}
    for operand in node.all_input_nodes:
        value = operand.meta.get("val")
        if not isinstance(value, torch.Tensor):
            if isinstance(value, (bool, int, float)):
                continue
            return None
        if value.dim() >= -axis.dim and value.shape[axis.dim] == out.shape[axis.dim]:
            found[operand] = axis
        elif value.dim() >= -axis.dim and value.shape[axis.dim] != 1:
            return None
    return found


def _pointwise_output(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    out, value = value_of(node), value_of(operand)
    if out is None or value is None or out.dim() < -axis.dim or out.shape[axis.dim] != value.shape[axis.dim]:
        return None
    return axis


def _always(node: fx.Node, zeros: set[fx.Node]) -> bool:
    return True


def _never(node: fx.Node, zeros: set[fx.Node]) -> bool:
    return False


def _all_operands(node: fx.Node, zeros: set[fx.Node]) -> bool:
    return len(node.args) > 1 and all(isinstance(a, fx.Node) and a in zeros for a in node.args[:2])


def _numerator(node: fx.Node, zeros: set[fx.Node]) -> bool:
    return node.args[0] in zeros and not (isinstance(node.args[1], fx.Node) and node.args[1] in zeros)


def _clamp_holds_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    return all(b is None or isinstance(b, (int, float)) for b in (low, high)) and (low or 0) <= 0 <= (high or 0)


def _hardtanh_holds_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    return float(argument(node, 1, "min_val", -1.0)) <= 0 <= float(argument(node, 2, "max_val", 1.0))


def _power_at_least_one(node: fx.Node, zeros: set[fx.Node]) -> bool:
    exponent = argument(node, 1, "exponent")
    return node.args[0] in zeros and isinstance(exponent, (int, float)) and exponent >= 1


def _threshold_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    return float(argument(node, 1, "threshold", 0.0)) >= 0 and float(argument(node, 2, "value", 0.0)) == 0


def _pointwise(zero: Zero) -> AxisRule:
    return AxisRule(_pointwise_operands, _pointwise_output, zero, pointwise=True)


# -- first operand only: casts and copies ---------------------------------------------------------------------------


def _first_operand(node: fx.Node, axis: Axis) -> Operands | None:
    first = node.args[0]
    return {first: axis} if isinstance(first, fx.Node) else None


def _first_output(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    return axis if operand is node.args[0] else None


# -- views ----------------------------------------------------------------------------------------------------------


def reshape_axis(source: Sequence[int], target: Sequence[int], axis: Axis) -> Axis | None:
    """Axis of `target` that holds `axis` of `source` when one shape is viewed as the other.

    The axis may merge with axes behind it (its factor grows); it may not be split or merge with axes before it.
    """
    position = len(source) + axis.dim
    for merged in range(position + 1, len(source) + 1):
        length, behind = math.prod(source[position:merged]), math.prod(source[merged:])
        for place, size in enumerate(target):
            if size == length and size > 1 and math.prod(target[place + 1 :]) == behind:
                return Axis(place - len(target), axis.factor * (length // source[position]))
    return None


def _reshape_operands(node: fx.Node, axis: Axis) -> Operands | None:
    first, out = node.args[0], value_of(node)
    value = value_of(first)
    if not isinstance(first, fx.Node) or value is None or out is None or _squeezes_any(node):
        return None
    found = reshape_axis(out.shape, value.shape, axis)
    return None if found is None else {first: found}


def _squeezes_any(node: fx.Node) -> bool:
    # a compact axis may have width 1, which squeeze() without a dimension would take away
    return op_name(node) == "squeeze" and len(node.args) + len(node.kwargs) == 1


def _reshape_output(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
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


def _permute_operands(node: fx.Node, axis: Axis) -> Operands | None:
    order, first = axes_of_permutation(node), node.args[0]
    if order is None or not isinstance(first, fx.Node):
        return None
    return {first: Axis(order[axis.dim] - len(order), axis.factor)}


def _permute_output(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    order = axes_of_permutation(node)
    if order is None:
        return None
    return Axis(order.index(len(order) + axis.dim) - len(order), axis.factor)


def _first_stays(node: fx.Node) -> bool:
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


def _index_operands(node: fx.Node, axis: Axis) -> Operands | None:
    if _part_of_several(node):
        return _first_operand(node, axis)
    order, first = axes_of_index(node), node.args[0]
    value = value_of(first)
    source = None if order is None else order[axis.dim]
    if source is None or value is None or not isinstance(first, fx.Node):
        return None
    return {first: Axis(source - value.dim(), axis.factor)}


def _index_output(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    if _part_of_several(node):
        return axis
    order, value = axes_of_index(node), value_of(operand)
    if order is None or value is None or operand is not node.args[0] or value.dim() + axis.dim not in order:
        return None
    return Axis(order.index(value.dim() + axis.dim) - len(order), axis.factor)


def _index_keeps_first(node: fx.Node) -> bool:
    order = axes_of_index(node)
    return _part_of_several(node) or (order is not None and order[:1] == [0])


def _part_of_several(node: fx.Node) -> bool:
    """One result of chunk, split or unbind: its axis is named by what made it."""
    return parts_of(node.args[0]) is not None


# -- along another axis ---------------------------------------------------------------------------------------------

_DIM: dict[str, tuple[int, str, Any]] = {
    **dict.fromkeys(("narrow", "select", "index_select", "cumsum"), (1, "dim", None)),
    **dict.fromkeys(("chunk", "split", "tensor_split", "split_with_sizes"), (2, "dim", 0)),
    "unbind": (1, "dim", 0),
    **dict.fromkeys(("flip", "sum", "mean", "amax", "amin"), (1, "dim", None)),
    "roll": (2, "dims", None),
    **dict.fromkeys(("softmax", "log_softmax"), (1, "dim", None)),
    **dict.fromkeys(("cat", "concat", "concatenate"), (1, "dim", 0)),
}
"""Operations along an axis -> place, name and default of the argument that names it (or several)."""
_REDUCTIONS = ("sum", "mean", "amax", "amin")


def _along(node: fx.Node, rank: int) -> list[int] | None:
    """The axes, counted from the front, along which the operation works; None if that is not said."""
    name = op_name(node)
    position, keyword, default = _DIM[name]
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


def _along_operands(node: fx.Node, axis: Axis) -> Operands | None:
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
    return None if source in along else dict.fromkeys(sources, Axis(source - rank, axis.factor))


def _along_output(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    value = value_of(operand)
    along = None if value is None else _along(node, value.dim())
    if value is None or along is None or operand not in _along_sources(node) or value.dim() + axis.dim in along:
        return None
    behind = sum(d > value.dim() + axis.dim for d in _removed(node, along))
    return Axis(axis.dim + behind, axis.factor)


def _along_keeps_first(node: fx.Node) -> bool:
    value = next(map(value_of, _along_sources(node)), None)
    along = None if value is None else _along(node, value.dim())
    return along is not None and 0 not in along


def _along_rule(zero: Zero) -> AxisRule:
    return AxisRule(_along_operands, _along_output, zero, _along_keeps_first, moves_rows=True)


def _all_sources(node: fx.Node, zeros: set[fx.Node]) -> bool:
    return zeros.issuperset(_along_sources(node))


# -- the table ------------------------------------------------------------------------------------------------------

_ZERO_AT_ZERO = (
    "relu relu6 leaky_relu elu selu celu gelu silu mish tanh tanhshrink softsign hardswish hardshrink softshrink "
    "abs neg sin asin arcsin atan arctan tan sinh asinh square sign erf expm1 log1p floor ceil round trunc"
)
_NOT_ZERO_AT_ZERO = (
    "sigmoid logsigmoid hardsigmoid softplus exp exp2 log cos cosh rsqrt sqrt reciprocal where maximum minimum eq ne "
    "lt le gt ge masked_fill logical_not"
)
COPIES = frozenset(["contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type", "type_as"])
_RESHAPES = "view reshape flatten unflatten squeeze unsqueeze view_as"
PERMUTATIONS = frozenset(["transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "moveaxis"])

AXIS_RULES: dict[str, AxisRule] = {
    **{name: _pointwise(_always) for name in _ZERO_AT_ZERO.split()},
    **{name: _pointwise(_never) for name in _NOT_ZERO_AT_ZERO.split()},
    **{name: _pointwise(_always) for name in ("mul", "multiply")},
    **{name: _pointwise(_all_operands) for name in ("add", "sub", "subtract")},
    **{name: _pointwise(_numerator) for name in ("div", "truediv", "divide", "true_divide")},
    **{name: _pointwise(_clamp_holds_zero) for name in ("clamp", "clip")},
    "hardtanh": _pointwise(_hardtanh_holds_zero),
    "threshold": _pointwise(_threshold_zero),
    "pow": _pointwise(_power_at_least_one),
    **{name: AxisRule(_first_operand, _first_output, _always) for name in COPIES},
    **{name: AxisRule(_reshape_operands, _reshape_output, _always, lambda node: False) for name in _RESHAPES.split()},
    **{
        name: AxisRule(_permute_operands, _permute_output, _always, _first_stays, moves_rows=True)
        for name in PERMUTATIONS
    },
    "getitem": AxisRule(_index_operands, _index_output, _always, _index_keeps_first, moves_rows=True),
    **{name: _along_rule(_never if "softmax" in name else _all_sources) for name in _DIM},
}
"""Operation name (as `graphs.op_name` gives it) -> its row. What has no row is dense."""


def rule_of(node: fx.Node) -> AxisRule | None:
    """The row of a node's operation, None where everything must be dense."""
    if value_of(node) is None and parts_of(node) is None:
        return None
    return AXIS_RULES.get(op_name(node))
