"""Where things lie: jitted pieces that turn compact positions into units, and program numbers into rows of a group.

Legend: a run is a stretch of kept units, its start a unit; positions count kept units; RUN = 0 stands for a dense axis,
on which position and unit are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def units_at(first, width, starts, units, RUN: tl.constexpr, WRAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Units of the positions first .. first + BLOCK, int32 [BLOCK]; those past the `width` repeat the last one.

    starts int64 [count]; units: length of the axis; WRAPS: runs may pass its end.
    """
    inside = tl.arange(0, BLOCK)
    if RUN == 0:
        return tl.minimum(first + inside, width - 1)
    if RUN % BLOCK == 0:
        # one run serves the whole block: one number to load, neighbouring units
        found = tl.load(starts + first // RUN).to(tl.int32) + first % RUN + inside
    else:
        positions = tl.minimum(first + inside, width - 1)
        found = tl.load(starts + positions // RUN).to(tl.int32) + positions % RUN
    if WRAPS:
        found = tl.where(found >= units, found - units, found)
    return found


@triton.jit
def group_rows(group, rows, leading, groups):
    """First row of a group and the one past its last: chunks of the leading axis, the first ones one longer."""
    each = rows // leading
    size = leading // groups
    more = leading % groups
    low = (group * size + tl.minimum(group, more)) * each
    high = low + (size + tl.where(group < more, 1, 0)) * each
    return low, high


@triton.jit
def group_of(row, rows, leading, groups):
    """The group of each row: the inverse of `group_rows`."""
    place = row // (rows // leading)
    size = leading // groups
    more = leading % groups
    longer = more * (size + 1)
    return tl.where(place < longer, place // (size + 1), more + (place - longer) // tl.maximum(size, 1))


@triton.jit
def swizzled(program, tiles_m, tiles_n, BAND: tl.constexpr):
    """Tile (m, n) of a program: BAND rows of tiles are walked column by column, so that both operands stay in L2."""
    band = program // (BAND * tiles_n)
    first = band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    inside = program % (BAND * tiles_n)
    return first + inside % height, inside // height
