"""The sizes that a view names: where the one of an axis stands, and another in its place."""

from __future__ import annotations

from typing import Any

from torch import fx

from dropfx.graph.nodes import op_name, value_of

SIZES_AFTER = {"view": 1, "reshape": 1, "unflatten": 2, "expand": 1}
"""Views that name sizes -> position of the first."""


def names_size(node: fx.Node, dim: int) -> bool:
    """Whether a view names the size of its axis `dim` (negative), other than as -1."""
    sizes, place = _sizes(node), _place(node, dim)
    return 0 <= place < len(sizes) and sizes[place] != -1


def name_size(node: fx.Node, dim: int, size: Any) -> None:
    """Let a view that names the size of its axis `dim` name another, a number or a node."""
    first, sizes = SIZES_AFTER[op_name(node)], _sizes(node)
    sizes[_place(node, dim)] = size
    nested = isinstance(node.args[first], (tuple, list))
    node.args = (*node.args[:first], tuple(sizes)) if nested else (*node.args[:first], *sizes)


def sizes_of_model(node: fx.Node) -> None:
    """view_as(x, model) -> view(x, *sizes of model): the model keeps its dense shape."""
    model, value = node.args[1], value_of(node)
    assert value is not None
    with node.graph.inserting_before(node):
        sizes = [node.graph.call_method("size", (model, d)) for d in range(value.dim())]
    for dim, size in enumerate(sizes):
        size.meta = {"val": value.size(dim)}
    node.target, node.args = "view", (node.args[0], *sizes)


def _sizes(node: fx.Node) -> list[Any]:
    sizes: list[Any] = list(node.args[SIZES_AFTER[op_name(node)] :])
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _place(node: fx.Node, dim: int) -> int:
    if op_name(node) != "unflatten":
        return len(_sizes(node)) + dim
    split, value, source = node.args[1], value_of(node), value_of(node.args[0])
    assert isinstance(split, int)
    assert value is not None
    assert source is not None
    return value.dim() + dim - split % source.dim()
