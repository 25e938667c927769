"""All draws of a call in one launch: one program per site hashes the site's slots and keeps the blocks of the largest.

The numbers are those of `dropfx.draws.draw_plan` and the choice that of `patterns.Block` and `patterns.Slice`, so that
a GPU, a CPU and either front end draw alike. The k-th largest of n hashes is found bit by bit: 63 counts over
registers, where a sort would exchange keys between threads. Among equal hashes the first count.

Legend: a slot is a block of the axis; k of n slots are kept.
Limits: latency; a program holds the n hashes of its site, so that n is at most MAX_SLOTS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SLOTS = 8192
"""Slots of a site: 32 hashes a thread."""
_ALIGN = 2
"""Starts before which a site's do not begin: 16 bytes, as compilers expect of their inputs."""


@triton.jit
def _mixed(x, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """`dropfx.draws.draw_plan._mix`: splitmix64's finaliser with arithmetic shifts, in int64, which wraps."""
    x = (x ^ (x >> 30)) * FIRST
    x = (x ^ (x >> 27)) * SECOND
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["rank_step"])
def _draw(
    number,  # int64 scalar: the call's number
    table,  # int64 [sites, 5]: key, slots, kept, units a slot, where in `out`
    out,  # int64
    rank_step,
    GOLDEN: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    RANKED: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    site = table + tl.program_id(0) * 5
    slots, kept, units, place = tl.load(site + 1), tl.load(site + 2), tl.load(site + 3), tl.load(site + 4)
    slot = tl.arange(0, BLOCK).to(tl.int64)
    everywhere = tl.zeros((BLOCK,), tl.int64)
    seed = tl.load(number + everywhere)
    if RANKED:
        seed = _mixed(seed + rank_step, FIRST, SECOND)
    hashes = _mixed(tl.load(site + everywhere) + (slot + 1) * GOLDEN + seed, FIRST, SECOND)
    if WINDOW:
        tl.store(out + place + slot, hashes % slots, mask=slot < 1)
    else:
        hashes = tl.where(slot < slots, hashes, -1)  # a hash is not negative
        least = tl.zeros((1,), tl.int64)
        for step in range(63):
            tried = least | (tl.full((1,), 1, tl.int64) << (62 - step))
            least = tl.where(tl.sum((hashes >= tried).to(tl.int32), 0) >= kept, tried, least)
        above, equal = hashes > least, hashes == least
        room = kept - tl.sum(above.to(tl.int32), 0)
        chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
        position = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(out + place + position, slot * units, mask=chosen)


class DrawnSite(NamedTuple):
    """What a site draws: `kept` of `slots` blocks of `units`; of a window, one start of `slots`.

    Attributes:
        key: signed 64-bit key.
    """

    key: int
    slots: int
    kept: int
    units: int


class DrawLaunch:
    """The starts of all sites of a plan from a call's number, without asking the device for a value.

    Args:
        sites: at least one, of blocks each with at most MAX_SLOTS slots; all windows or all blocks.
        constants: the hash' signed 64-bit step from slot to slot, and splitmix64's two factors.
    """

    def __init__(
        self, sites: Sequence[DrawnSite], constants: tuple[int, int, int], device: torch.device, window: bool
    ) -> None:
        self._parts: list[tuple[int, int]] = []
        rows, place = [], 0
        for site in sites:
            rows.append([*site, place])
            self._parts.append((place, site.kept))
            place += -(-site.kept // _ALIGN) * _ALIGN
        self._table = torch.tensor(rows, dtype=torch.int64).to(device)
        self._length, self._constants, self._window = place, constants, window
        self._block = 16 if window else max(16, triton.next_power_of_2(max(site.slots for site in sites)))

    def __call__(self, number: Tensor, rank_step: int = 0) -> list[Tensor]:
        """Ascending starts, int64 [kept], of each site; `rank_step`, signed, is hashed into the number unless 0."""
        out = self._table.new_empty(self._length)
        golden, first, second = self._constants
        with torch.cuda.device_of(out):
            _draw[(len(self._parts),)](
                *(number, self._table, out, rank_step),
                GOLDEN=golden,
                FIRST=first,
                SECOND=second,
                RANKED=rank_step != 0,
                WINDOW=self._window,
                BLOCK=self._block,
                num_warps=max(1, min(8, self._block // 128)),
            )
        return [out[place : place + kept] for place, kept in self._parts]
