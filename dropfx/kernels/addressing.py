"""Where things lie: jitted pieces that turn compact positions into units, and program numbers into rows of a group.

Legend: a run is a stretch of kept units, its start a unit; positions count kept units; RUN = 0 stands for a dense axis,
on which position and unit are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def aligned(size, ALIGNMENT: tl.constexpr):
    """A size that is a multiple of ALIGNMENT, in a form from which compilers know it: masks then cut no vector."""
    return size // ALIGNMENT * ALIGNMENT


@triton.jit
def units_at(
    first, width, starts, units, RUN: tl.constexpr, WRAPS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Units of the positions first .. first + BLOCK, int32 [BLOCK]; those past the `width` are to be masked.

    starts int64 [count]; units: length of the axis; WRAPS: runs may pass its end; CHUNK: as `Axis.chunk`. The unit is
    sought of each chunk's first position, so that compilers see chunks of neighbours, which they load as one vector.
    """
    positions = first + tl.arange(0, BLOCK)
    if RUN == 0:
        return positions
    if RUN % BLOCK == 0:
        # one run serves the whole block: one number to load
        head = tl.load(starts + first // RUN).to(tl.int32) + first % RUN
        if not WRAPS:
            return head // CHUNK * CHUNK + tl.arange(0, BLOCK)
    heads = positions // CHUNK * CHUNK
    found = tl.load(starts + heads // RUN, mask=heads < width, other=0).to(tl.int32) // CHUNK * CHUNK + heads % RUN
    if WRAPS:
        found = tl.where(found >= units, found - units, found)
    found += positions % CHUNK
    if RUN % BLOCK == 0 and CHUNK == 1:
        # a window: neighbours but for where it wraps, wherever it starts; threads side by side should read them
        found = tl.max_contiguous(found, 8)
    return found


@triton.jit
def looked_up(table, index, mask, CHUNK: tl.constexpr):
    """(table[index] where that is not negative, whether it is not): int32 and bool [BLOCK], False past the `mask`.

    The table counts on within aligned stretches of CHUNK, or is negative in all of one: only their first is read.
    """
    found = tl.load(table + index // CHUNK * CHUNK, mask=mask, other=-1)
    return found // CHUNK * CHUNK + index % CHUNK, found >= 0


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
