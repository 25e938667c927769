"""Where a size comes from: what it can vary with, and the first value of which it can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from dropfx.graph.axis_rules import AXIS_RULES, COPIES, PERMUTATIONS, axes_of_index, axes_of_permutation
from dropfx.graph.dropout_ops import DROPOUT_FUNCTIONS
from dropfx.graph.nodes import argument, is_parameter, op_name, value_of
from dropfx.graph.op_families import CONVOLUTIONS, POOLS, SPLITS

Source = tuple[fx.Node, int]


def origin(node: fx.Node, dim: int) -> Source | int:
    """The first value that has the size, with its axis counted from the front; or a number that the program names."""
    found: Source | int = (node, dim)
    while not isinstance(found, int):
        step = _earlier(*found)
        if step is None:
            break
        found = step
    return found


def is_fixed(node: fx.Node, dim: int) -> bool:
    """Whether the size is a parameter's or the program's, or one that Dynamo guards on: the same in every call."""
    found = origin(node, dim)
    if isinstance(found, int) or is_parameter(found[0]):
        return True
    traced = found[0].meta.get("example_value")
    return isinstance(traced, Tensor) and type(traced.shape[found[1]]) is int


def _earlier(node: fx.Node, dim: int) -> Source | int | None:
    name, value, first = op_name(node), value_of(node), node.args[0] if node.args else None
    if value is None:
        return None
    dim %= value.dim()
    if name == "linear":
        weight, last = argument(node, 1, "weight"), dim == value.dim() - 1
        found = (weight, 0) if last else (argument(node, 0, "input"), dim)
        return found if isinstance(found[0], fx.Node) else None
    if name in CONVOLUTIONS and dim in (0, 1) and value.dim() == CONVOLUTIONS[name] + 2:
        found = (argument(node, 0, "input"), 0) if dim == 0 else (argument(node, 1, "weight"), 0)
        return found if isinstance(found[0], fx.Node) else None
    if name in (*POOLS, "interpolate") and dim in (0, 1) and isinstance(first, fx.Node):
        return first, dim
    if name in PERMUTATIONS and isinstance(first, fx.Node):
        axes = axes_of_permutation(node)
        return None if axes is None else (first, axes[dim])
    if name == "getitem" and isinstance(first, fx.Node) and op_name(first) in SPLITS:
        whole, along = argument(first, 0, "tensor"), argument(first, 2, "dim", 0)
        apart = isinstance(whole, fx.Node) and isinstance(along, int) and along % value.dim() != dim
        return (whole, dim) if apart else None
    if name == "getitem" and isinstance(first, fx.Node):
        kept = axes_of_index(node)
        return None if kept is None or kept[dim] is None else (first, kept[dim])  # type: ignore[return-value]
    if name in ("view", "reshape"):
        return _named(node.args[1:], dim, value.dim())
    if name in _MADE:
        return _named(node.args[isinstance(first, fx.Node) and node.op == "call_method" :], dim, value.dim())
    if name.endswith("_like") and isinstance(first, fx.Node):
        return first, dim
    rule = AXIS_RULES.get(name)
    if (rule is not None and rule.pointwise) or name in COPIES or node.target in DROPOUT_FUNCTIONS:
        same = [o for o in node.all_input_nodes if (v := value_of(o)) is not None and v.shape == value.shape]
        return (same[0], dim) if same else None
    return None


_MADE = frozenset(["empty", "zeros", "ones", "full", "new", "new_empty", "new_zeros", "new_ones", "new_full"])
"""Operations that make a tensor of the sizes that they are given."""


def _named(sizes: Sequence[Any], dim: int, rank: int) -> Source | int | None:
    """The size that an operation names for an axis."""
    if sizes and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    size = sizes[dim] if len(sizes) == rank else None
    if type(size) is int:
        return None if size == -1 else size
    if isinstance(size, fx.Node) and op_name(size) == "size" and len(size.args) == 2:
        source, asked = size.args
        value = value_of(source)
        if isinstance(source, fx.Node) and isinstance(asked, int) and value is not None:
            return source, asked % value.dim()
    return None
