"""`slice`: one contiguous cyclic window of k units (SliceOut, arXiv 2007.10909)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dropfx.patterns.base import MAX_RATE_ERROR, Draw, Fit, Pattern, PatternRefused, nearest_count

_NON_NEGATIVE = 2**63 - 1


@dataclass(frozen=True)
class Slice(Pattern):
    """Keep a window of k neighbouring units that begins anywhere and wraps around the end of the axis."""

    name = "slice"

    def fit(self, units: int, rate: float, groups: int = 1) -> Fit:
        """See `Pattern.fit`: the window whose length is nearest to the rate.

        Raises:
            PatternRefused: a single unit, or no length that meets the rate to 0.02.
        """
        if units < 2:
            raise PatternRefused(f"an axis of {units} unit(s) is too short to keep some and drop some")
        kept = nearest_count(units, rate)
        drawn = 1.0 - kept / units
        if abs(drawn - rate) > MAX_RATE_ERROR:
            raise PatternRefused(f"no window over {units} units meets rate {rate:g} to within {MAX_RATE_ERROR}")
        return Fit(units=units, run=kept, count=1, numbers=1, drawn_rate=drawn, groups=groups)

    def choose(self, hashes: Tensor, fit: Fit) -> list[Draw]:
        """See `Pattern.choose`: one start for each site, uniform over the units; groups have theirs evenly spaced."""
        starts = hashes & _NON_NEGATIVE
        if fit.groups > 1:
            # evenly spaced windows cover each unit floor or ceil of kept * groups / units times
            starts = (starts % fit.units + torch.arange(fit.groups, device=hashes.device) * fit.units // fit.groups)[
                ..., None
            ]
        return [Draw(row, fit.run, fit.scale, fit) for row in (starts % fit.units).unbind(0)]
