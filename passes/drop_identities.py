"""cat([x]) -> x        expand(x, sizes of x) -> x        x[:, 0:n] -> x        x.chunk(1)[0] -> x

What changes nothing would end a region all the same. Only what changes nothing in any call is taken away: sizes are
compared by where they come from, and a size that the trace merely happened to have proves nothing.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dropfx.graph.nodes import argument, op_name, parts_of, value_of
from dropfx.graph.notes import notes
from dropfx.graph.op_families import CATS, SPLITS
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.graph.size_origin import is_fixed, origin

_EXPANSIONS = ("expand", "broadcast_to")
_REPETITIONS = ("repeat", "tile")
_COPIES = (*CATS, *_REPETITIONS, "pad")


def drop_identities(module: fx.GraphModule, context: Context) -> PassResult:
    """Let readers of an identity read its operand."""
    modified = False
    for node in list(module.graph.nodes):
        if "pinned" in notes(node) or any(user.op == "output" for user in node.users):
            continue
        if op_name(node) == "getitem":
            modified |= _shorten(node)
        source = _source(node)
        if source is not None and "pinned" not in notes(source):
            modified |= _drop(node, source)
    return PassResult(module, modified)


def _drop(node: fx.Node, source: fx.Node) -> bool:
    value, operand = value_of(node), value_of(source)
    if value is None or operand is None or value.shape != operand.shape:
        return False
    if op_name(node) in _COPIES and value.stride() != operand.stride():  # a view behind it may rely on its layout
        if not value.is_contiguous():
            return False
        node.op, node.target, node.args, node.kwargs = "call_method", "contiguous", (source,), {}
        return True
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
    return True


def _source(node: fx.Node) -> fx.Node | None:
    """The value that a node passes on; None where it may change it."""
    name, first = op_name(node), argument(node, 0, "input")
    if name in CATS:
        parts: Any = first if first is not None else argument(node, 0, "tensors")
        return parts[0] if isinstance(parts, (list, tuple)) and len(parts) == 1 else None
    if not isinstance(first, fx.Node):
        return None
    if name == "getitem":
        return _whole_part(first) if parts_of(first) is not None else first if _takes_all(node) else None
    sizes = _listed(node.args[1:])
    if name in _EXPANSIONS:
        return first if _same_sizes(first, sizes) else None
    if name == "expand_as":
        other = argument(node, 1, "other")
        return first if isinstance(other, fx.Node) and _same_shape(first, other) else None
    if name in _REPETITIONS:
        value = value_of(first)
        ones = value is not None and len(sizes) == value.dim() and all(_is_number(size, 1) for size in sizes)
        return first if ones else None
    if name == "pad":
        widths = argument(node, 1, "pad")
        none = isinstance(widths, (list, tuple)) and all(_is_number(width, 0) for width in widths)
        return first if none else None
    if name == "narrow":
        dim, start, length = (argument(node, *given) for given in ((1, "dim"), (2, "start"), (3, "length")))
        return first if _is_number(start, 0) and isinstance(dim, int) and _is_size(length, first, dim) else None
    return None


def _is_number(value: Any, number: int) -> bool:
    return type(value) is int and value == number


def _listed(sizes: Any) -> list[Any]:
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else list(sizes)


# -- sizes ----------------------------------------------------------------------------------------------------------


def _is_size(size: Any, node: fx.Node, dim: int) -> bool:
    """Whether `size` is the node's own in every call."""
    value = value_of(node)
    if value is None:
        return False
    dim %= value.dim()
    if type(size) is int:
        return size == value.size(dim) and is_fixed(node, dim)
    if not isinstance(size, fx.Node) or op_name(size) != "size" or len(size.args) != 2:
        return False
    other, asked = size.args
    return isinstance(other, fx.Node) and isinstance(asked, int) and _same_size(node, dim, other, asked)


def _same_size(node: fx.Node, dim: int, other: fx.Node, asked: int) -> bool:
    value = value_of(other)
    return value is not None and origin(node, dim) == origin(other, asked % value.dim())


def _same_sizes(node: fx.Node, sizes: list[Any]) -> bool:
    value = value_of(node)
    if value is None or len(sizes) != value.dim():
        return False
    return all(_is_number(size, -1) or _is_size(size, node, dim) for dim, size in enumerate(sizes))


def _same_shape(node: fx.Node, other: fx.Node) -> bool:
    value, like = value_of(node), value_of(other)
    if value is None or like is None or value.shape != like.shape:
        return False
    fixed = [is_fixed(node, dim) and is_fixed(other, dim) for dim in range(value.dim())]
    return all(known or _same_size(node, dim, other, dim) for dim, known in enumerate(fixed))


# -- parts ----------------------------------------------------------------------------------------------------------


def _takes_all(node: fx.Node) -> bool:
    index = node.args[1]
    items = index if isinstance(index, tuple) else (index,)
    return all(item is Ellipsis or (isinstance(item, slice) and item == slice(None)) for item in items)


def _shorten(node: fx.Node) -> bool:
    """x[:, 0:n] -> x[:, :] for the n positions that there are."""
    value, index = value_of(node.args[0]), node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    if value is None or not any(isinstance(item, slice) for item in items):
        return False
    plain = all(item is None or item is Ellipsis or type(item) in (int, slice) for item in items)
    used = sum(item is not None and item is not Ellipsis for item in items)
    dim = 0
    for place, item in enumerate(items if plain else ()):
        if isinstance(item, slice) and _covers(item, node.args[0], dim):
            items[place] = slice(None)
        dim += value.dim() - used if item is Ellipsis else item is not None
    shorter = tuple(items) if isinstance(index, tuple) else items[0]
    modified = bool(shorter != index)
    node.update_arg(1, shorter)
    return modified


def _covers(item: slice, node: Any, dim: int) -> bool:
    if item.step not in (None, 1) or item.start not in (None, 0):
        return False
    value = value_of(node)
    if item.stop is None or value is None:
        return item.stop is None
    if type(item.stop) is int and item.stop >= value.size(dim):
        return is_fixed(node, dim)
    return _is_size(item.stop, node, dim)


def _whole_part(parts: fx.Node) -> fx.Node | None:
    """What was split into one part."""
    name, source = op_name(parts), argument(parts, 0, "input")
    several, dim = parts_of(parts), argument(parts, 2, "dim", 0)
    if several is None or len(several) > 1 or not isinstance(source, fx.Node) or not isinstance(dim, int):
        return None
    if name == "chunk" and _is_number(argument(parts, 1, "chunks"), 1):
        return source
    value = value_of(source)
    return source if name in SPLITS and value is not None and is_fixed(source, dim % value.dim()) else None
