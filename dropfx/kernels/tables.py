"""Where each unit of an axis went in a draw, in one launch: a program asks all runs about its own units.

    inverse [groups, N]: position of a kept unit, -1 for a dropped one
    order   [N]: all units, the kept ones by position, then the dropped ones

Legend: N units of the axis; a run is a stretch of kept units.
Limits: latency; N * runs comparisons.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropfx.kernels.axes import Axis
from dropfx.kernels.interpreter import INTERPRETED
from dropfx.kernels.launch import on_its_device

_UNITS, _RUNS = (32, 16) if INTERPRETED else (128, 32)


@triton.jit
def _found(unit, starts, count, units, RUN: tl.constexpr, RUNS: tl.constexpr, UNITS: tl.constexpr):
    """Of units [UNITS]: position or -1, and how many kept units lie before each."""
    position = tl.full((UNITS,), -1, tl.int32)
    before = tl.zeros((UNITS,), tl.int32)
    for first in range(0, count, RUNS):
        number = first + tl.arange(0, RUNS)
        # a run that is not there begins past all units
        start = tl.load(starts + number, mask=number < count, other=units).to(tl.int32)
        past = tl.where(number < count, tl.maximum(start + RUN - units, 0), 0)[None, :]
        place = unit[:, None] - start[None, :]
        place = tl.where(unit[:, None] < past, place + units, place)  # the part of a window that wraps
        inside = (place >= 0) & (place < RUN)
        position = tl.maximum(position, tl.max(tl.where(inside, number[None, :] * RUN + place, -1), 1))
        head = tl.minimum(tl.maximum(unit[:, None] - start[None, :], 0), RUN - past)
        before += tl.sum(head + tl.minimum(unit[:, None], past), 1)
    return position, before


@triton.jit(do_not_specialize=["count", "units", "starts_group"])
def _table(
    starts,  # int64 [groups, count]
    table,  # int32 [groups, N]
    count,
    units,
    starts_group,
    RUN: tl.constexpr,
    ORDER: tl.constexpr,
    RUNS: tl.constexpr,
    UNITS: tl.constexpr,
):
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    group = tl.program_id(1)
    position, before = _found(unit, starts + group * starts_group, count, units, RUN, RUNS, UNITS)
    if ORDER:
        place = tl.where(position < 0, count * RUN + unit - before, position)
        tl.store(table + place, unit, mask=unit < units)
    else:
        tl.store(table + group * units + unit, position, mask=unit < units)


@on_its_device
def _launched(starts: Tensor, kept: Axis, order: bool) -> Tensor:
    starts = starts.contiguous()
    table = starts.new_empty((kept.groups, kept.units), dtype=torch.int32)
    _table[(triton.cdiv(kept.units, _UNITS), kept.groups)](
        *(starts, table, starts.size(-1), kept.units, starts.size(-1)),
        RUN=kept.run,
        ORDER=order,
        RUNS=_RUNS,
        UNITS=_UNITS,
    )
    return table


def inverse(kept: Axis) -> Tensor:
    """Position of each unit or -1 where it is dropped, int32 [groups, units]; not for padding."""
    assert kept.starts is not None
    return _launched(kept.starts, kept, order=False)


def order(kept: Axis) -> Tensor:
    """All units, int32 [units]: the kept ones by position, then the dropped ones. Without groups."""
    assert kept.starts is not None
    assert kept.groups == 1
    return _launched(kept.starts, kept, order=True)[0]
