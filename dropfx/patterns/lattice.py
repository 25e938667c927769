"""`row` and `tile`: lattices whose period each forward draws anew (Approximate Random Dropout, arXiv 1805.08939)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dropfx.errors import InvalidOption
from dropfx.patterns.base import MAX_RATE_ERROR, Draw, Fit, Pattern, PatternRefused, TileDraw
from dropfx.patterns.search import default_max_period, search

_SCALES = ("global", "period")


@dataclass(frozen=True)
class Row(Pattern):
    """Keep every dp-th unit: those with (i - b) mod dp = 0, dp from the searched distribution, b uniform in 1..dp.

    The paper's RDP. With several groups all share the period and take biases in turn.

    Args:
        max_period: largest period; None for the smallest N with (N-1)/N >= p + .05. Never more than the units.
        scale: multiplier of kept units: "global" 1/(1-p), whose second moment is that of independent dropout, or
            "period" dp, which is unbiased too but far noisier.

    Raises:
        InvalidOption: an argument is not accepted.
    """

    max_period: int | None = None
    scale: str = "global"
    name = "row"
    on_host = True

    def __post_init__(self) -> None:
        _check_period(self.max_period)
        if self.scale not in _SCALES:
            raise InvalidOption(f"scale: got {self.scale!r}, accepted are 'global' and 'period'")

    def fit(self, units: int, rate: float, groups: int = 1) -> Fit:
        """See `Pattern.fit`: the probabilities of the periods that meet the rate.

        Raises:
            PatternRefused: a single unit, or a rate that no distribution up to the largest period meets.
        """
        if units < 2:
            raise PatternRefused(f"an axis of {units} unit(s) is too short to keep some and drop some")
        return _fit(units, rate, self.max_period, groups, ragged=groups > 1 or self.scale == "period")

    def choose(self, hashes: Tensor, fit: Fit) -> list[Draw]:
        """See `Pattern.choose`: as many starts as the drawn period leaves, each of a single unit."""
        return [self._one(hashes, *lattice, fit) for lattice in _lattices(hashes, fit)]

    def _one(self, hashes: Tensor, period: int, bias: int, fit: Fit) -> Draw:
        scale = fit.scale if self.scale == "global" else float(period)
        if fit.groups == 1:
            units = torch.arange(bias, fit.units, period)
            by_unit = torch.full(units.shape, scale, dtype=torch.float64) if fit.ragged else scale
            if period == 1:  # one run of all units: nothing is copied
                return Draw(hashes.new_zeros(1), fit.units, by_unit, fit)
            return Draw(units, 1, by_unit, fit)
        biases = (bias + torch.arange(fit.groups))[:, None] % period
        units = biases + torch.arange(0, fit.units, period)
        beyond = units >= fit.units
        # a group with one unit less is padded by a unit that it drops, with scale 0
        return Draw(torch.where(beyond, biases + 1, units), 1, (~beyond).to(torch.float64) * scale, fit)


@dataclass(frozen=True)
class Tile(Pattern):
    """Drop a weight by tiles: tile (r, c) is kept where (r + c - b) mod dp = 0, dp and b drawn as for `Row`.

    The paper's TDP: a structured DropConnect. The paper numbers tiles t = r * columns + c, which drops whole columns
    where dp divides the number of columns. Here each row of tiles is numbered as if the number of columns were 1 more
    than a multiple of dp, whatever it is, so that every period moves on by one tile from row to row.

    Args:
        shape: rows and columns of a tile; those at the edges may be smaller.
        max_period: largest period; None for the smallest N with (N-1)/N >= p + .05. Never more than the tiles along
            the weight's longer side, so that every draw keeps a tile.

    Raises:
        InvalidOption: an argument is not accepted.
    """

    shape: tuple[int, int] = (32, 32)
    max_period: int | None = None
    name = "tile"
    fields = ("lattice", "scale")
    on_host = True
    drops_weights = True

    def __post_init__(self) -> None:
        _check_period(self.max_period)
        sizes = self.shape
        if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or not all(type(s) is int and s >= 1 for s in sizes):
            raise InvalidOption(f"shape: got {self.shape!r}, accepted are two integers >= 1: rows, columns of a tile")
        object.__setattr__(self, "shape", tuple(sizes))

    def tiles(self, rows: int, columns: int) -> int:
        """Tiles along the longer side of a [rows, columns] weight: `units` of `fit`."""
        return max(-(-rows // self.shape[0]), -(-columns // self.shape[1]))

    def fit(self, units: int, rate: float, groups: int = 1) -> Fit:
        """See `Pattern.fit`; `units` are tiles along the longer side of the weight.

        Raises:
            PatternRefused: several groups, a single tile, or a rate that no distribution of periods meets.
        """
        if groups != 1:
            raise PatternRefused("the whole batch shares the tiles of a weight: groups must be 1")
        if units < 2:
            raise PatternRefused(f"a weight of a single {self.shape[0]}x{self.shape[1]} tile has no tile to drop")
        return _fit(units, rate, self.max_period, groups, ragged=False)

    def choose(self, hashes: Tensor, fit: Fit) -> list[TileDraw]:
        """See `Pattern.choose`: a period and a bias for each site."""
        return [TileDraw(torch.tensor(lattice), fit.scale) for lattice in _lattices(hashes, fit)]


def _check_period(max_period: int | None) -> None:
    if max_period is not None and (type(max_period) is not int or max_period < 2):
        raise InvalidOption(f"max_period: got {max_period!r}, accepted are None and integers >= 2")


@functools.lru_cache(maxsize=1024)
def _fit(units: int, rate: float, max_period: int | None, groups: int, ragged: bool) -> Fit:
    longest = min(max_period or default_max_period(rate), units)
    highest = (longest - 1) / longest
    if rate - highest > MAX_RATE_ERROR:
        raise PatternRefused(f"periods up to {longest} drop at most {highest:.3g} of the units, less than {rate:g}")
    drawn = min(rate, highest)
    periods = search(drawn, longest).tolist()
    return Fit(
        units=units,
        run=1,
        count=0,
        numbers=2,
        drawn_rate=drawn,
        ragged=ragged,
        groups=groups,
        periods=tuple(periods),
    )


def _lattices(hashes: Tensor, fit: Fit) -> list[tuple[int, int]]:
    """(period, bias) of each site, bias in 0..period-1, from hashes [sites, 2]."""
    found = []
    for first, second in hashes.tolist():
        point = (first >> 10 & 2**53 - 1) / 2**53  # in [0, 1); the top bit of a hash is always 0
        period, reached = 1, fit.periods[0]
        while point >= reached and period < len(fit.periods):
            reached += fit.periods[period]
            period += 1
        found.append((period, second % period))
    return found
