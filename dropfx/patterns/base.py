"""What a pattern is: which units of an axis a draw keeps.

Every draw is a list of *starts*: unit positions at which contiguous runs of equal length begin, taken modulo the
number of units. One form serves all patterns, so the operators know runs and nothing else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

MAX_RATE_ERROR = 0.02
"""Largest |drawn rate - p| at which a site is rewritten (design promise 3)."""


class PatternRefused(ValueError):
    """The pattern cannot serve this axis and rate; the message is the reason shown in `explain`."""


@dataclass(frozen=True)
class Realisation:
    """A pattern fitted to an axis: `count` runs of `run` units out of `slots` equally likely places.

    Attributes:
        units: length of the axis.
        run: units in a run.
        count: runs kept by a draw.
        slots: hashed numbers that a draw consumes.
        drawn_rate: exact probability that a unit is dropped.
        ragged: the last run may pass the end of the axis; those positions are padding with scale 0.
    """

    units: int
    run: int
    count: int
    slots: int
    drawn_rate: float
    ragged: bool = False

    @property
    def width(self) -> int:
        """Compact width: units kept by a draw, padding included."""
        return self.run * self.count

    @property
    def scale(self) -> float:
        """Multiplier of a kept unit that makes the draw unbiased."""
        return 1.0 / (1.0 - self.drawn_rate)


class Pattern(ABC):
    """A rule by which a step's kept units are drawn."""

    name: str

    @abstractmethod
    def realise(self, units: int, rate: float) -> Realisation:
        """Fit the pattern to an axis of `units` units at drop probability 0 < `rate` < 1.

        Raises:
            PatternRefused: the axis cannot be dropped at this rate.
        """

    @abstractmethod
    def starts(self, hashes: Tensor, realisation: Realisation) -> Tensor:
        """Draw from int64 `hashes` [sites, slots]: starts of the kept runs, int64 [sites, count], ascending."""


def nearest_count(places: int, rate: float) -> int:
    """Kept places out of `places` nearest to the rate, at least one kept and one dropped."""
    return min(max(math.floor(places * (1.0 - rate) + 0.5), 1), places - 1)
