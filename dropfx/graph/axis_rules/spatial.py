"""Images: [samples, channels, *positions], whose channels stay apart in what works on positions alone."""

from __future__ import annotations

from torch import fx

from dropfx.graph.axis_rules.pointwise import first_output
from dropfx.graph.axis_rules.rule import AxisRule, Operands
from dropfx.graph.layers import depthwise, unit_dim
from dropfx.graph.nodes import argument, value_of
from dropfx.graph.notes import UnitAxis


def _channels(node: fx.Node, axis: UnitAxis) -> Operands | None:
    x, out = argument(node, 0, "input"), value_of(node)
    value = value_of(x)
    if not isinstance(x, fx.Node) or value is None or out is None or value.dim() != out.dim():
        return None
    if out.dim() < 3 or axis.dim != 1 - out.dim() or value.shape[:2] != out.shape[:2]:
        return None
    return {x: axis}


def _padded(node: fx.Node, axis: UnitAxis) -> Operands | None:
    pads = argument(node, 1, "pad")
    behind = isinstance(pads, (list, tuple)) and axis.dim < -(len(pads) // 2)
    return _channels(node, axis) if behind else None


def _pads_zeros(node: fx.Node, zeros: set[fx.Node]) -> bool:
    return argument(node, 2, "mode", "constant") != "constant" or not argument(node, 3, "value", None)


def _filtered(node: fx.Node, axis: UnitAxis) -> Operands | None:
    """A depthwise convolution takes the filters and biases of its channels along."""
    if not depthwise(node) or axis.dim != unit_dim(node):
        return None
    x, weight, bias = (argument(node, place, name) for place, name in enumerate(("input", "weight", "bias")))
    value = value_of(weight)
    assert value is not None
    found: Operands = {x: axis, weight: UnitAxis(-value.dim(), axis.factor)}
    return found if bias is None else {**found, bias: UnitAxis(-1, axis.factor)}


def _unbiased(node: fx.Node, zeros: set[fx.Node]) -> bool:
    return argument(node, 2, "bias") is None


POSITIONS = AxisRule(_channels, first_output, lambda node, zeros: True)
"""Pooling and resizing: of zeros they make zeros."""
PADDING = AxisRule(_padded, first_output, _pads_zeros)
FILTERS = AxisRule(_filtered, first_output, _unbiased, leads=lambda node: False, moves_rows=True)
"""Several draws end there: a channel has one filter for all rows."""
