"""What a pattern is: which units of an axis a draw keeps.

Every draw of a pattern of units is a list of *starts*: unit positions at which contiguous runs of equal length begin,
taken modulo the number of units. One form serves all of them, so the operators know runs and nothing else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_RATE_ERROR = 0.02
"""Largest |drawn rate - p| at which a site is rewritten, unless the user sets the block size (docs/design.md, 3)."""


class PatternRefused(ValueError):
    """The pattern cannot serve this axis and rate; the message is the reason shown in `explain`."""


@dataclass(frozen=True)
class Fit:
    """A pattern fitted to an axis: `count` runs of `run` units, or periods with their probabilities.

    Attributes:
        units: length of the axis (of a tiled weight: tiles along its longer side).
        run: units in a run.
        count: runs kept by a draw; 0 where it varies.
        numbers: hashed numbers that a draw consumes.
        drawn_rate: exact probability that a unit is dropped.
        ragged: runs may pass the end of the axis; those positions are padding with scale 0.
        groups: draws per batch, one for each contiguous chunk of rows.
        periods: probabilities of the periods 1, 2, ... of a lattice; empty for patterns of blocks.
    """

    units: int
    run: int
    count: int
    numbers: int
    drawn_rate: float
    ragged: bool = False
    groups: int = 1
    periods: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Compact width where it is static: units kept by a draw, padding included."""
        return self.run * self.count

    @property
    def keep(self) -> float:
        """Expected share of kept units."""
        return 1.0 - self.drawn_rate

    @property
    def scale(self) -> float:
        """Multiplier of a kept unit that makes the draw unbiased."""
        return 1.0 / self.keep


class Draw(NamedTuple):
    """What one draw keeps of an axis, and what the graph receives.

    Attributes:
        starts: int64 [count], first unit of each kept run, ascending; [groups, count] where a batch has several draws.
        run: units in a run; positions are taken modulo the number of units.
        scale: multiplier of the kept units: a float, or [(groups,) width] with zeros at padding.
        fit: the pattern fitted to the axis.
    """

    starts: Tensor
    run: int
    scale: float | Tensor
    fit: Fit

    @property
    def width(self) -> int:
        """Compact width of this draw, padding included."""
        return self.starts.size(-1) * self.run

    def by_unit(self) -> Draw:
        """The same with runs of one unit, so that the run's length does not vary by draw."""
        return self if self.run == 1 else self._replace(starts=unwrapped(self.starts, self.run), run=1)

    def units(self) -> Tensor:
        """Kept units, int64 [(groups,) width], padding wrapped to the axis' beginning."""
        return unwrapped(self.starts, self.run) % self.fit.units

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Dense multiplier [(groups,) units]: 0 where dropped, the scale where kept."""
        units = self.units()
        scale = torch.as_tensor(self.scale, dtype=dtype, device=units.device).expand_as(units)
        mask = torch.zeros(*units.shape[:-1], self.fit.units, dtype=dtype, device=units.device)
        return mask.scatter_add_(-1, units, scale)


class TileDraw(NamedTuple):
    """What one draw keeps of a tiled weight: the tiles (r, c) with (r + c - bias) mod period = 0, times scale.

    Attributes:
        lattice: int64 [2] on the CPU: period, bias.
    """

    lattice: Tensor
    scale: float

    @property
    def period(self) -> int:
        """One of this many tiles along a row or column of tiles is kept."""
        return int(self.lattice[0])

    @property
    def bias(self) -> int:
        """Sum of row and column, modulo the period, of the tiles that are kept."""
        return int(self.lattice[1])

    def mask(self, rows: int, columns: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Dense multiplier [rows, columns] of a weight cut in tiles of `shape`."""
        place = (torch.arange(rows) // shape[0])[:, None] + torch.arange(columns) // shape[1]
        kept: Tensor = (place - self.bias) % self.period == 0
        return kept.to(dtype) * self.scale


class Pattern(ABC):
    """A rule by which the kept units of a forward are drawn.

    Attributes:
        name: as options and reports spell it.
        fields: inputs of the graph that a draw is, in order.
        on_host: its draws are made from numbers on the CPU, since the shape of what is kept depends on them.
        drops_weights: it drops parts of the weights after a dropout, in place of units.
    """

    name: str
    fields: tuple[str, ...] = ("starts", "run", "width", "scale")
    on_host = False
    drops_weights = False

    @abstractmethod
    def fit(self, units: int, rate: float, groups: int = 1) -> Fit:
        """Fit the pattern to an axis of `units` units at drop probability 0 < `rate` < 1.

        Raises:
            PatternRefused: the axis cannot be dropped at this rate.
        """

    @abstractmethod
    def choose(self, hashes: Tensor, fit: Fit) -> Sequence[Any]:
        """Draw for each row of int64 `hashes` [sites, numbers]: a `Draw` or a `TileDraw`."""


def nearest_count(places: int, rate: float) -> int:
    """Kept places out of `places` nearest to the rate, at least one kept and one dropped."""
    return min(max(math.floor(places * (1.0 - rate) + 0.5), 1), places - 1)


def padded_scale(starts: Tensor, run: int, units: int, scale: float) -> Tensor:
    """float64 [*, width]: the scale, and 0 at the padding that lies beyond the axis."""
    return (unwrapped(starts, run) < units).to(torch.float64) * scale


def unwrapped(starts: Tensor, run: int) -> Tensor:
    """Positions [*, width] of the runs that begin at `starts` [*, count], not taken modulo the axis."""
    if run == 1:
        return starts
    return (starts[..., None] + torch.arange(run, device=starts.device)).flatten(-2)
