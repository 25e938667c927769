"""take(x)[o, j] = x[o, kept[j]]     put(y)[o, kept[j]] = base[o, kept[j]] + alpha * y[o, j],  base (or 0) elsewhere.

Tensors are seen as [outer, units, inner]. Legend: o an outer row, q a place in the flattened [units * inner].
Limits: bytes; each item is read once and written once, dropped ones are not read.
"""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from dropfx.kernels.addressing import group_of
from dropfx.kernels.axes import Axis
from dropfx.kernels.interpreter import INTERPRETED
from dropfx.kernels.launch import on_its_device

_OUTER, _PLACES = (4, 16) if INTERPRETED else (8, 256)


@triton.jit(do_not_specialize=["outers", "width", "units", "leading", "groups"])
def _take(
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
    BLOCK_O: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = (o < outers)[:, None] & (q < width * inner)[None, :]
    position = (q // inner)[None, :]
    mine = starts + (group_of(o, outers, leading, groups) * group_step)[:, None]
    unit = tl.load(mine + position // RUN, mask=inside, other=0).to(tl.int32) + position % RUN
    if WRAPS:
        unit = tl.where(unit >= units, unit - units, unit)
    row = o.to(tl.int64)[:, None]
    found = tl.load(x + row * units * inner + unit * inner + (q % inner)[None, :], mask=inside, other=0)
    tl.store(out + row * width * inner + q[None, :], found, mask=inside)


@triton.jit(do_not_specialize=["outers", "width", "units", "leading", "groups"])
def _put(
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
    BLOCK_O: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = (o < outers)[:, None] & (q < units * inner)[None, :]
    mine = inverse + (group_of(o, outers, leading, groups) * group_step)[:, None]
    position = tl.load(mine + (q // inner)[None, :], mask=inside, other=-1)
    row = o.to(tl.int64)[:, None]
    kept = inside & (position >= 0)
    made = tl.load(y + row * width * inner + position * inner + (q % inner)[None, :], mask=kept, other=0)
    place = row * units * inner + q[None, :]
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


def _grid(outer: int, places: int) -> tuple[int, int]:
    return triton.cdiv(outer, _OUTER), triton.cdiv(places, _PLACES)


@on_its_device
def take_units(x: Tensor, dim: int, kept: Axis, leading: int = 1) -> Tensor:
    """Compact copy of the kept units of axis `dim`; with groups x's first axis is the one of length `leading`."""
    out = _resized(x, dim, kept.width)
    if not out.numel():
        return out
    x = x.contiguous()
    outer, inner = _seen(x, dim)
    starts, step = kept.arguments(x)
    _take[_grid(outer, kept.width * inner)](
        *(x, out, starts, outer, kept.width, kept.units, inner, leading, kept.groups, step),
        RUN=kept.run,
        WRAPS=kept.wraps,
        BLOCK_O=_OUTER,
        BLOCK_Q=_PLACES,
    )
    return out


@on_its_device
def put_units(
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
    _put[_grid(outer, kept.units * inner)](
        *(y, y if base is None else base.contiguous(), out, kept.inverse()),
        *(outer, kept.width, kept.units, inner, leading, kept.groups, kept.units, alpha),
        BASE=base is not None,
        BLOCK_O=_OUTER,
        BLOCK_Q=_PLACES,
    )
    return out
