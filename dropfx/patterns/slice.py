"""`slice`: one contiguous cyclic window of k units (SliceOut, arXiv 2007.10909)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dropfx.patterns.base import MAX_RATE_ERROR, Pattern, PatternRefused, Realisation, nearest_count

_NON_NEGATIVE = 2**63 - 1


@dataclass(frozen=True)
class Slice(Pattern):
    """Keep a window of k neighbouring units that begins anywhere and wraps around the end of the axis."""

    name = "slice"

    def realise(self, units: int, rate: float) -> Realisation:
        if units < 2:
            raise PatternRefused(f"an axis of {units} unit(s) cannot be dropped in part")
        kept = nearest_count(units, rate)
        drawn = 1.0 - kept / units
        if abs(drawn - rate) > MAX_RATE_ERROR:
            raise PatternRefused(f"no window over {units} units meets rate {rate:g} to within {MAX_RATE_ERROR}")
        return Realisation(units=units, run=kept, count=1, slots=1, drawn_rate=drawn)

    def starts(self, hashes: Tensor, realisation: Realisation) -> Tensor:
        return (hashes & _NON_NEGATIVE) % realisation.units
