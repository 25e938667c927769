"""How the axis of samples passes through each operation: the second table, from which the branches of row sites grow.

Sample i of the output may need sample i of the operands alone. What works unit by unit on an axis works sample by
sample on it, so the first table holds here too; this one adds what mixes units and leaves samples apart.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from dropfx.graph.axis_rules.pointwise import broadcast_operands, first_operand, pointwise_operands
from dropfx.graph.axis_rules.rule import Operands
from dropfx.graph.axis_rules.table import RESHAPES, rule_of
from dropfx.graph.axis_rules.views import reshape_operands
from dropfx.graph.dropout_ops import DROPOUT_FUNCTIONS, OF_ELEMENTS
from dropfx.graph.nodes import argument, op_name, value_of
from dropfx.graph.notes import UnitAxis, notes
from dropfx.graph.op_families import ALL_CONVOLUTIONS, POOLS

SampleRule = Callable[[fx.Node, UnitAxis], Operands | None]
"""(node, output axis of the samples) -> their axis in each operand that has them; None where samples mix."""


def _first(node: fx.Node, axis: UnitAxis) -> Operands | None:
    """The operand of the layer has the output's axis."""
    x, value, out = argument(node, 0, "input"), value_of(argument(node, 0, "input")), value_of(node)
    if value is None or out is None or value.dim() != out.dim() or value.shape[axis.dim] != out.shape[axis.dim]:
        return None
    return {x: axis}


def _before(axes: int) -> SampleRule:
    """A layer over its last `axes` axes."""
    return lambda node, axis: _first(node, axis) if axis.dim < -axes else None


def _normalized(node: fx.Node, axis: UnitAxis) -> Operands | None:
    shape = argument(node, 1, "normalized_shape")
    return _first(node, axis) if isinstance(shape, (list, tuple)) and axis.dim < -len(shape) else None


def _batch_norm(node: fx.Node, axis: UnitAxis) -> Operands | None:
    """In evaluation mode; in training its statistics are of all samples."""
    return _leading(node, axis) if argument(node, 5, "training", False) is False else None


def _leading(node: fx.Node, axis: UnitAxis) -> Operands | None:
    """A layer of [samples, channels, ...]."""
    value = value_of(node)
    return _first(node, axis) if value is not None and value.dim() + axis.dim == 0 else None


def _padded(node: fx.Node, axis: UnitAxis) -> Operands | None:
    pads, value = argument(node, 1, "pad"), value_of(node)
    if not isinstance(pads, (list, tuple)) or value is None or argument(node, 2, "mode", "constant") != "constant":
        return None
    return _first(node, axis) if axis.dim < -(len(pads) // 2) else None


def _along_one(position: int, name: str, default: int) -> SampleRule:
    """An operation along one axis, named by an argument."""

    def rule(node: fx.Node, axis: UnitAxis) -> Operands | None:
        value, dim = value_of(node), argument(node, position, name, default)
        if value is None or not isinstance(dim, int) or dim % value.dim() == axis.dim % value.dim():
            return None
        return _first(node, axis)

    return rule


def _matmul(node: fx.Node, axis: UnitAxis) -> Operands | None:
    first, second = argument(node, 0, "input"), argument(node, 1, "other" if op_name(node) == "matmul" else "mat2")
    values = value_of(first), value_of(second)
    if values[0] is None or values[1] is None or min(v.dim() for v in values if v is not None) < 2:
        return None
    if axis.dim < -2:
        return broadcast_operands([first, second], node, axis)
    alone = values[1].dim() == 2 and axis.dim == -2  # rows of the first by a matrix that all share
    return {first: axis} if alone else None


def _attention(node: fx.Node, axis: UnitAxis) -> Operands | None:
    if argument(node, 4, "dropout_p", 0.0) != 0.0 or axis.dim >= -2:
        return None
    operands = [argument(node, place, name) for place, name in enumerate(("query", "key", "value", "attn_mask"))]
    return broadcast_operands([o for o in operands if isinstance(o, fx.Node)], node, axis)


def _reshape(node: fx.Node, axis: UnitAxis) -> Operands | None:
    """With the batch outermost on both sides each sample stays whole, whatever becomes of the axes behind it."""
    first, out = node.args[0], value_of(node)
    value = value_of(first)
    if value is None or out is None or not isinstance(first, fx.Node):
        return None
    if out.dim() + axis.dim == 0 and value.dim():
        factor, rest = divmod(value.size(0), out.size(0) // axis.factor)
        if rest == 0 and factor:
            return {first: UnitAxis(-value.dim(), factor)}
    return reshape_operands(node, axis)


def _einsum(node: fx.Node, axis: UnitAxis) -> Operands | None:
    equation, operands, out = node.args[0], list(node.args[1:]), value_of(node)
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "..." in equation or out is None:
        return None
    given, made = equation.replace(" ", "").split("->")
    terms, letter = given.split(","), made[axis.dim]
    if len(terms) != len(operands) or len(made) != out.dim():
        return None
    found: Operands = {}
    for term, operand in zip(terms, operands, strict=True):
        if letter in term and isinstance(operand, fx.Node):
            if term.count(letter) != 1 or operand in found:
                return None
            found[operand] = UnitAxis(term.index(letter) - len(term), axis.factor)
    return found


def _lookup(node: fx.Node, axis: UnitAxis) -> Operands | None:
    indices = argument(node, 0, "input")
    return {indices: UnitAxis(axis.dim + 1, axis.factor)} if isinstance(indices, fx.Node) and axis.dim < -1 else None


def _expand(node: fx.Node, axis: UnitAxis) -> Operands | None:
    first, value, out = argument(node, 0, "input"), value_of(node.args[0]), value_of(node)
    if value is None or out is None:
        return None
    if value.dim() < -axis.dim or value.shape[axis.dim] == 1:
        return {} if op_name(node) != "expand_as" else None  # from one that all samples share
    return {first: axis}


_LP_POOLS = [f"lp_pool{n}d" for n in (1, 2, 3)]

SAMPLE_RULES: dict[str, SampleRule] = {
    "linear": _before(1),
    "layer_norm": _normalized,
    "rms_norm": _normalized,
    "group_norm": _leading,
    "batch_norm": _batch_norm,
    **dict.fromkeys([*ALL_CONVOLUTIONS, *POOLS, *_LP_POOLS, "interpolate"], _leading),
    "pixel_shuffle": _before(3),
    "pixel_unshuffle": _before(3),
    "pad": _padded,
    "normalize": _along_one(2, "dim", 1),
    "glu": _along_one(1, "dim", -1),
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    **dict.fromkeys(RESHAPES, _reshape),
    "embedding": _lookup,
    "expand": _expand,
    "expand_as": pointwise_operands,
    "detach": first_operand,
}
"""Operation name -> its row, where the first table has none that holds for samples."""


def samples_of_operands(node: fx.Node, axis: UnitAxis) -> Operands | None:
    """The axis of the samples in each operand that has them, None where the operation is not known to keep them apart.

    Operands that are left out are shared by all samples.
    """
    if node.target in DROPOUT_FUNCTIONS:
        known = "site" in notes(node) and (notes(node)["site"].rate == 0 or node.target in OF_ELEMENTS)
        return first_operand(node, axis) if known else None
    if (rule := SAMPLE_RULES.get(op_name(node))) is not None:
        return rule(node, axis) if value_of(node) is not None else None
    known = rule_of(node)
    return None if known is None else known.operands(node, axis)
