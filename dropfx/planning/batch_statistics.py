"""Whether what a site drops reaches a statistic over the rows that share its draw.

Independent dropout leaves every unit some rows in which it is kept. A draw that rows share can leave a unit constant in
all of them: its variance is that of rounding, and what divides by it magnifies the rounding. So a site before a batch
normalisation runs as written, as long as units stay apart on the way: through adds, views, whatever works unit by unit,
up to an operation that mixes units, such as a Linear. Several draws per batch do not help: each may drop the same unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from dropfx.graph.axis_rules import AXIS_RULES, COPIES, PERMUTATIONS, axes_of_permutation
from dropfx.graph.axis_rules.along import DIM
from dropfx.graph.dropout_ops import DROPOUT_FUNCTIONS
from dropfx.graph.layers import depthwise
from dropfx.graph.nodes import argument, op_name, value_of
from dropfx.graph.op_families import CATS, DIVISIONS, SPLITS
from dropfx.ops.shared_dropout import shared_dropout

BATCH_NORM = "a draw shared by the batch would reach the statistics of a batch normalisation"


@dataclass(frozen=True)
class Trail:
    """What a value still shows of the dropped units.

    Attributes:
        axes: of each axis, counted from the front, what lies along it: "u" units, "r" rows that share the draw here
            and would not in PyTorch, "ur" both, "" neither; None where the shape is known only when it runs.
        reduced: rows were summed up in it.
    """

    axes: tuple[str, ...] | None
    reduced: bool = False


def reached_statistic(module: fx.GraphModule, site: fx.Node, unit_axis: int) -> str:
    """Why rows cannot share a draw of the site: the statistic over them that the dropped units reach; "" for none."""
    value = value_of(site)
    if value is None:
        return ""
    trails = {site: Trail(_at_site(site, value, unit_axis))}
    node = site.next
    while node.op != "root":
        read = {operand: trails[operand] for operand in node.all_input_nodes if operand in trails}
        if read:
            if reason := _statistic(module, node, read):
                return reason
            trail = _behind(node, read)
            if trail is not None and (trail.axes is None or any("u" in axis for axis in trail.axes)):
                trails[node] = trail
        node = node.next
    return ""


def _at_site(site: fx.Node, value: Tensor, unit_axis: int) -> tuple[str, ...]:
    """In PyTorch an element has its own mask, a channel one for all axes after it, and a shared mask says so."""
    units, rank = value.dim() + unit_axis, value.dim()
    shared = argument(site, 2, "shared") if site.target is shared_dropout else (False,) * rank
    last = rank if DROPOUT_FUNCTIONS[site.target] == -1 else units
    return tuple("u" if d == units else "r" if d < last and not shared[d] else "" for d in range(rank))


# -- statistics -----------------------------------------------------------------------------------------------------

_SPREADS = {
    **dict.fromkeys(("std", "var", "std_mean", "var_mean"), (1, "dim", None)),
    **dict.fromkeys(("norm", "linalg_norm", "linalg_vector_norm", "vector_norm"), (2, "dim", None)),
    "normalize": (2, "dim", 1),
}
"""Spreads and lengths along axes -> place, name and default of the argument that names the axes."""
_DIVISORS = ("rsqrt", "reciprocal")


def _statistic(module: fx.GraphModule, node: fx.Node, read: dict[fx.Node, Trail]) -> str:
    name, trail = _plain(node), next(iter(read.values()))
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if _divides_by(node, read):
        return f"a draw shared by the batch would reach the divisor of {name}, a statistic over its rows"
    along = _along(node, name, called, trail)
    if along is None or not _spreads_over(trail, along):
        return ""
    if "batch_norm" in name or isinstance(called, nn.modules.batchnorm._BatchNorm):
        return BATCH_NORM
    return f"a draw shared by the batch would reach a statistic over its rows, {name or node.target}"


def _along(node: fx.Node, name: str, called: nn.Module | None, trail: Trail) -> Sequence[int] | None:
    """The axes over which a node takes a statistic; None where it takes none."""
    rank = 0 if trail.axes is None else len(trail.axes)
    channels = [d for d in range(rank) if d != 1]
    if isinstance(called, nn.modules.batchnorm._BatchNorm):
        return channels  # it may be set to training later
    if isinstance(called, nn.modules.instancenorm._InstanceNorm):
        return channels[1:]
    if isinstance(called, nn.GroupNorm):
        return range(1 if called.num_groups == 1 else 2, rank)
    if name in ("batch_norm", "native_batch_norm"):
        return None if argument(node, 5, "training", False) is False else channels
    if name == "instance_norm":
        return None if argument(node, 5, "use_input_stats", True) is False else channels[1:]
    if name == "group_norm":  # few units may be a group
        return range(1 if argument(node, 1, "num_groups") == 1 else 2, rank)
    return _dims(node, *_SPREADS[name], rank) if name in _SPREADS else None


def _spreads_over(trail: Trail, along: Sequence[int]) -> bool:
    """Whether a statistic along axes is one over rows that keeps units apart."""
    if trail.axes is None:
        return True
    rows = any("r" in trail.axes[d] for d in along)
    return rows and any("u" in axis for d, axis in enumerate(trail.axes) if d not in along)


def _divides_by(node: fx.Node, read: dict[fx.Node, Trail]) -> bool:
    """Whether the divisor was summed up over rows."""
    name = _plain(node)
    if name in _DIVISORS:
        divisor: Any = argument(node, 0, "input")
    elif name in DIVISIONS:
        divisor = argument(node, 1, "other")
    elif name == "pow":
        exponent = argument(node, 1, "exponent")
        divisor = node.args[0] if isinstance(exponent, (int, float)) and exponent < 0 else None
    else:
        return False
    return divisor in read and read[divisor].reduced


def _dims(node: fx.Node, place: int, keyword: str, default: Any, rank: int) -> list[int]:
    """The axes that an argument names, all where it names none."""
    dims = argument(node, place, keyword, default)
    if isinstance(dims, bool) or dims is None:  # std(x, unbiased)
        return list(range(rank))
    listed = [dims] if isinstance(dims, int) else list(dims)
    return [d % rank for d in listed if isinstance(d, int) and rank] or list(range(rank))


# -- how far units stay apart ---------------------------------------------------------------------------------------

_ELEMENTWISE = (
    "lerp addcmul addcdiv nan_to_num prelu rrelu rsub fmod remainder masked_scatter copysign float_power sign sgn "
    "positive alpha_dropout cumsum cumprod flip roll index_select narrow batch_norm native_batch_norm instance_norm"
)
"""Operations besides those of the axis rules in which units stay apart and the axes are the first operand's."""
_RESHAPES = frozenset(["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"])
_BROADCASTS = frozenset(["expand", "expand_as", "broadcast_to", "repeat", "tile"])
_SPATIAL = ("pool", "interpolate", "upsample", "pad")
_REDUCTIONS = ("sum", "mean", "amax", "amin", "nanmean", "nansum", "logsumexp")
_PARTS = (
    *SPLITS,
    "unsafe_chunk",
    "unsafe_split",
    "unsafe_split_with_sizes",
)


def _plain(node: fx.Node) -> str:
    """The operation's name without what says that it writes in place."""
    name = op_name(node).strip("_")
    return name[1:] if name in _INPLACE else name


_INPLACE = frozenset(["iadd", "isub", "imul", "itruediv", "ipow"])


def _behind(node: fx.Node, read: dict[fx.Node, Trail]) -> Trail | None:
    """The trail of a node's value, None where it mixes units."""
    name, trails = _plain(node), list(read.values())
    first, out = trails[0], value_of(node)
    if name == "getitem" and node.args[0] in read:
        return _indexed(node, first)
    if any(trail.axes is None for trail in trails):
        return Trail(None) if _known(name) else None
    if name in _PARTS or name == "unbind":
        lost = argument(node, 1, "dim", 0) if name == "unbind" else None
        return first if lost is None else _without(first, [lost % len(first.axes or ())])
    if out is None:
        return None
    if name in _REDUCTIONS:
        return _reduced(node, first)
    if name in _RESHAPES:
        operand = value_of(next(iter(read)))
        return None if operand is None else Trail(_reshaped(operand.shape, out.shape, first.axes or ()), first.reduced)
    if name in PERMUTATIONS:
        order = axes_of_permutation(node)
        return None if order is None else Trail(tuple((first.axes or ())[d] for d in order), first.reduced)
    if name == "select":
        dim = argument(node, 1, "dim")
        return _without(first, [dim % len(first.axes or ())]) if isinstance(dim, int) else None
    if name == "stack":
        dim, axes = argument(node, 1, "dim", 0) % out.dim(), first.axes or ()
        return Trail((*axes[:dim], "", *axes[dim:]), first.reduced)
    if _known(name) or node.target in DROPOUT_FUNCTIONS or depthwise(node):
        return _aligned(out, read)
    return None


def _known(name: str) -> bool:
    rule = AXIS_RULES.get(name)
    if rule is not None and (rule.pointwise or name in COPIES or name in CATS):
        return True
    return name in _ELEMENTWISE.split() or name in _BROADCASTS or any(part in name for part in _SPATIAL)


def _aligned(out: Tensor, read: dict[fx.Node, Trail]) -> Trail:
    """Operands broadcast against each other, from the last axis on; an axis that became one of length 1 is gone."""
    axes = [""] * out.dim()
    for operand, trail in read.items():
        value = value_of(operand)
        for back, what in enumerate(reversed(trail.axes or ()), 1):
            shrunk = value is not None and value.size(-back) > 1 and back <= out.dim() and out.size(-back) == 1
            if back <= out.dim() and not shrunk:
                axes[-back] = "".join(sorted({*axes[-back], *what}, reverse=True))
    return Trail(tuple(axes), all(trail.reduced for trail in read.values()))


def _without(trail: Trail, lost: Sequence[int]) -> Trail:
    return Trail(tuple(axis for d, axis in enumerate(trail.axes or ()) if d not in lost), trail.reduced)


def _reduced(node: fx.Node, trail: Trail) -> Trail:
    axes = trail.axes or ()
    along = _dims(node, *DIM.get(_plain(node), (1, "dim", None)), len(axes))
    over_rows = trail.reduced or any("r" in axes[d] for d in along)
    if argument(node, 2, "keepdim", False):
        return Trail(tuple("" if d in along else axis for d, axis in enumerate(axes)), over_rows)
    return Trail(_without(trail, along).axes, over_rows)


def _indexed(node: fx.Node, trail: Trail) -> Trail:
    """x[...]: by tensors its axes are not followed; one of several results has the axes of what was split."""
    value, index = value_of(node.args[0]), node.args[1]
    if trail.axes is None or value is None:
        return trail
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if not all(item is None or item is Ellipsis or type(item) in (int, slice) for item in items):
        return Trail(None)
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    axes: list[str] = []
    dim = 0
    for item in items:
        if item is None:
            axes.append("")
            continue
        taken = value.dim() - used if item is Ellipsis else 1
        axes += trail.axes[dim : dim + taken] if item is Ellipsis or isinstance(item, slice) else ()
        dim += taken
    return Trail(tuple(axes), trail.reduced)


def _reshaped(source: Sequence[int], target: Sequence[int], axes: Sequence[str]) -> tuple[str, ...]:
    """What lies along the axes of a view: each run of axes that was split or merged shows what was along any of it."""
    made = [""] * len(target)
    for before, behind in _runs(source, target):
        what = "".join(sorted({letter for d in before for letter in axes[d]}, reverse=True))
        for d in behind:
            made[d] = what if target[d] > 1 else ""
    return tuple(made)


def _runs(source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The shortest runs of axes of two shapes that hold as many elements each."""
    i = j = 0
    while i < len(source) or j < len(target):
        start, other = i, j
        i, j = min(i + 1, len(source)), min(j + 1, len(target))
        while (left := math.prod(source[start:i])) != (right := math.prod(target[other:j])):
            if left < right and i < len(source):
                i += 1
            elif j < len(target):
                j += 1
            else:
                i, j = len(source), len(target)
                break
        yield range(start, i), range(other, j)
