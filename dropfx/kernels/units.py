"""gather(x)[o, j] = x[o, kept[j]]   scatter(y)[o, kept[j]] = base[o, kept[j]] + alpha * y[o, j], base (or 0) elsewhere.

Tensors are seen as [outer, units, inner]. Legend: o an outer row, q a place in the flattened [units * inner], of which
CHUNK lie side by side in the compact tensor and in the dense one.
Limits: bytes; each item is read once and written once, dropped ones are not read.
"""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from dropfx.kernels.addressing import aligned, group_of
from dropfx.kernels.axes import Axis, alignment
from dropfx.kernels.interpreter import INTERPRETED
from dropfx.kernels.launch import on_its_device
from dropfx.kernels.tables import inverse

_OUTER, _PLACES = (4, 16) if INTERPRETED else (8, 256)


@triton.jit
def _place(places, BLOCK_O: tl.constexpr, BLOCK_Q: tl.constexpr):
    """(o, q) of a program, int32 [BLOCK_O] and int64 [BLOCK_Q]; grids of more axes end at 65,535 programs on these."""
    across = tl.cdiv(places, BLOCK_Q)
    program = tl.program_id(0)
    o = program // across * BLOCK_O + tl.arange(0, BLOCK_O)
    return o.to(tl.int32), program % across * BLOCK_Q + tl.arange(0, BLOCK_Q)


@triton.jit(do_not_specialize=["outers", "width", "units", "leading", "groups"])
def _gather(
    x,  # [outer, units, inner]
    out,  # [outer, width, inner]
    starts,
    outers,
    width,
    units,
    inner,
    leading,
    groups,
    group_step,
    RUN: tl.constexpr,
    WRAPS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH_ALIGNMENT: tl.constexpr,
    UNITS_ALIGNMENT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    compact = aligned(width.to(tl.int64) * inner, WIDTH_ALIGNMENT)
    dense = aligned(units.to(tl.int64) * inner, UNITS_ALIGNMENT)
    o, q = _place(compact, BLOCK_O, BLOCK_Q)
    inside = (o < outers)[:, None] & (q < compact)[None, :]
    head = q // CHUNK * CHUNK
    position = (head // inner)[None, :]
    mine = starts + (group_of(o, outers, leading, groups) * group_step)[:, None]
    unit = tl.load(mine + position // RUN, mask=inside, other=0) + position % RUN
    if WRAPS:
        unit = tl.where(unit >= units, unit - units, unit)
    row = o.to(tl.int64)[:, None]
    read = (unit * inner + (head % inner)[None, :]) // CHUNK * CHUNK + (q % CHUNK)[None, :]
    found = tl.load(x + row * dense + read, mask=inside, other=0)
    tl.store(out + row * compact + q[None, :], found, mask=inside)


@triton.jit(do_not_specialize=["outers", "width", "units", "leading", "groups"])
def _scatter(
    y,  # [outer, width, inner]
    base,  # [outer, units, inner]
    out,  # [outer, units, inner]
    inverse,  # int32 [groups, units]
    outers,
    width,
    units,
    inner,
    leading,
    groups,
    group_step,
    alpha,
    BASE: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH_ALIGNMENT: tl.constexpr,
    UNITS_ALIGNMENT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    compact = aligned(width.to(tl.int64) * inner, WIDTH_ALIGNMENT)
    dense = aligned(units.to(tl.int64) * inner, UNITS_ALIGNMENT)
    o, q = _place(dense, BLOCK_O, BLOCK_Q)
    inside = (o < outers)[:, None] & (q < dense)[None, :]
    head = q // CHUNK * CHUNK
    mine = inverse + (group_of(o, outers, leading, groups) * group_step)[:, None]
    position = tl.load(mine + (head // inner)[None, :], mask=inside, other=-1)
    row = o.to(tl.int64)[:, None]
    kept = inside & (position >= 0)
    read = (position.to(tl.int64) * inner + (head % inner)[None, :]) // CHUNK * CHUNK + (q % CHUNK)[None, :]
    made = tl.load(y + row * compact + read, mask=kept, other=0)
    place = row * dense + q[None, :]
    if BASE:
        made = tl.load(base + place, mask=inside, other=0).to(tl.float32) + made.to(tl.float32) * alpha
    tl.store(out + place, made.to(out.dtype.element_ty), mask=inside)


def _seen(x: Tensor, dim: int) -> tuple[int, int]:
    """(outer, inner) of x around axis `dim`."""
    dim %= x.dim()
    return prod(x.shape[:dim]), prod(x.shape[dim + 1 :])


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    dim %= x.dim()
    return x.new_empty([*x.shape[:dim], size, *x.shape[dim + 1 :]])


def _grid(outer: int, places: int) -> tuple[int]:
    return (triton.cdiv(outer, _OUTER) * triton.cdiv(places, _PLACES),)


def _options(kept: Axis, inner: int) -> dict[str, int]:
    """Compile-time arguments of both kernels."""
    return {
        "CHUNK": alignment(kept.chunk * inner),
        "WIDTH_ALIGNMENT": alignment(kept.run * inner),
        "UNITS_ALIGNMENT": alignment(kept.units * inner),
        "BLOCK_O": _OUTER,
        "BLOCK_Q": _PLACES,
    }


@on_its_device
def gather_units(x: Tensor, dim: int, kept: Axis, leading: int = 1) -> Tensor:
    """Compact copy of the kept units of axis `dim`; with groups x's first axis is the one of length `leading`."""
    out = _resized(x, dim, kept.width)
    if not out.numel():
        return out
    x = x.contiguous()
    outer, inner = _seen(x, dim)
    starts, step = kept.arguments(x)
    _gather[_grid(outer, kept.width * inner)](
        *(x, out, starts, outer, kept.width, kept.units, inner, leading, kept.groups, step),
        RUN=kept.run,
        WRAPS=kept.wraps,
        **_options(kept, inner),
    )
    return out


@on_its_device
def scatter_units(
    y: Tensor, dim: int, kept: Axis, leading: int = 1, base: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """Dense tensor with alpha * y at the kept units of axis `dim`, added to `base` where given; not for padding.

    Args:
        base: of the dense shape and the result's dtype.
    """
    assert not kept.ragged
    out = _resized(y if base is None else y.to(base.dtype), dim, kept.units)
    if not out.numel():
        return out
    y = y.contiguous()
    outer, inner = _seen(y, dim)
    _scatter[_grid(outer, kept.units * inner)](
        *(y, y if base is None else base.contiguous(), out, inverse(kept)),
        *(outer, kept.width, kept.units, inner, leading, kept.groups, kept.units, alpha),
        BASE=base is not None,
        **_options(kept, inner),
    )
    return out
