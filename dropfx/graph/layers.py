"""Layers that multiply by a weight [out, in, ...]: where their units lie, and the matrix product each amounts to."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from dropfx.graph.nodes import argument, op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.op_families import CONVOLUTIONS


def unit_dim(layer: fx.Node) -> int:
    """The axis of the units of a Linear, an Embedding or a convolution, counted from the end."""
    return -1 - CONVOLUTIONS.get(op_name(layer), 0)


def multiplies(node: fx.Node) -> bool:
    """Whether it is a layer of which every unit on one side meets every unit on the other."""
    spatial = 0 if op_name(node) == "linear" else CONVOLUTIONS.get(op_name(node))
    values = [value_of(argument(node, place, name)) for place, name in enumerate(("input", "weight"))]
    if spatial is None or value_of(node) is None or any(value is None for value in values):
        return False
    x, weight = values
    batched = spatial == 0 or x.dim() == spatial + 2  # type: ignore[union-attr]
    return batched and weight.dim() == spatial + 2 and conv_groups(node) == 1  # type: ignore[union-attr]


def depthwise(node: fx.Node) -> bool:
    """Whether it is a convolution that gives each channel one filter of its own."""
    weight, out, groups = value_of(argument(node, 1, "weight")), value_of(node), conv_groups(node)
    if op_name(node) not in CONVOLUTIONS or weight is None or out is None or groups == 1:
        return False
    return weight.size(0) == groups and weight.size(1) == 1 and out.dim() == weight.dim()


def pointwise(node: fx.Node) -> bool:
    """Whether it is a convolution that treats each position for itself: a Linear over the channels."""
    weight = value_of(argument(node, 1, "weight"))
    if op_name(node) not in CONVOLUTIONS or not multiplies(node) or weight is None:
        return False
    return all(size == 1 for size in weight.shape[2:]) and argument(node, 4, "padding", 0) in (*_NO_PADDING, "valid")


_NO_PADDING: tuple[Any, ...] = (0, *((0,) * axes for axes in (1, 2, 3)))


def conv_groups(node: fx.Node) -> Any:
    """The argument `groups` of a convolution; 1 for other layers."""
    return argument(node, 6, "groups", 1) if op_name(node) in CONVOLUTIONS else 1


def products_of(layer: fx.Node) -> tuple[int, int, int, int]:
    """(M, N, K, products) of a layer that multiplies: a product forward, and one for each gradient asked of it."""
    operands = argument(layer, 0, "input"), argument(layer, 1, "weight")
    x, weight = map(value_of, operands)
    out = value_of(layer)
    assert x is not None
    assert weight is not None
    assert out is not None
    rows = out.numel() // max(out.size(unit_dim(layer)), 1)
    asked = 1 + sum(bool(notes(o).get("asks_gradient")) for o in operands)
    return rows, weight.size(0), math.prod(weight.shape[1:]), asked


def taps_of(convolution: fx.Node) -> tuple[int, int]:
    """Its input channels, and the values that it reads of each for one position."""
    weight = value_of(argument(convolution, 1, "weight"))
    assert weight is not None
    return weight.size(1), math.prod(weight.shape[2:])
