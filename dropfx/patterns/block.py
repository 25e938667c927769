"""`block`: exactly k of n/b blocks of b contiguous units, drawn uniformly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dropfx.errors import InvalidOption
from dropfx.patterns.base import MAX_RATE_ERROR, Pattern, PatternRefused, Realisation, nearest_count

MIN_BLOCKS = 32
"""Blocks on an axis below which an automatic size is made smaller: fewer give too few sub-models."""
MAX_AUTO_BLOCK = 128
"""Longer runs copy no faster."""


@dataclass(frozen=True)
class Block(Pattern):
    """Keep k of the axis' blocks of `size` contiguous units, each choice equally likely.

    Args:
        size: units in a block, or "auto" for the largest divisor of the axis that leaves at least 32 blocks and
            meets the rate to 0.02.

    Raises:
        InvalidOption: `size` is neither "auto" nor a positive integer.
    """

    size: int | str = "auto"
    name = "block"

    def __post_init__(self) -> None:
        if self.size == "auto":
            return
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise InvalidOption(f"block: got {self.size!r}, accepted are 'auto' and integers >= 1")

    def realise(self, units: int, rate: float) -> Realisation:
        if isinstance(self.size, int):
            return _fit(units, rate, self.size)
        if units < 2:
            raise PatternRefused(f"an axis of {units} unit(s) cannot be dropped in part")
        for size in range(min(MAX_AUTO_BLOCK, max(units // MIN_BLOCKS, 1)), 0, -1):
            if units % size:
                continue
            fit = _fit(units, rate, size)
            if abs(fit.drawn_rate - rate) <= MAX_RATE_ERROR:
                return fit
        nearest = _fit(units, rate, 1).drawn_rate
        raise PatternRefused(
            f"{units} units meet rate {rate:g} no nearer than {nearest:.3g}, allowed is {MAX_RATE_ERROR}"
        )

    def starts(self, hashes: Tensor, realisation: Realisation) -> Tensor:
        chosen = hashes.topk(realisation.count, dim=1, sorted=False).indices
        # in order, so that neighbouring kept blocks are found next to each other
        starts = chosen.sort(dim=1).values
        return starts if realisation.run == 1 else starts * realisation.run


def _fit(units: int, rate: float, size: int) -> Realisation:
    if size >= units:
        raise PatternRefused(f"block size {size} leaves fewer than two blocks on an axis of {units} units")
    blocks = -(-units // size)
    count = nearest_count(blocks, rate)
    return Realisation(
        units=units,
        run=size,
        count=count,
        slots=blocks,
        drawn_rate=1.0 - count / blocks,
        ragged=units % size != 0,
    )
