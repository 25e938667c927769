"""Closed forms of a pattern's statistics, and the reference that they are held against: independent dropout.

A *place* is what a draw keeps or drops whole: a unit, or a tile of a weight. Every family drops all places with the
same probability; then the spread of the kept share gives the mean correlation of all pairs as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dropfx.patterns import Block, Draw, Fit, Pattern, Row, Slice, Tile


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one draw.

    Attributes:
        pair_correlations: of the keep indicators of places 1, 2, 3, ... apart, averaged over the pairs that far apart;
            tiles: apart along a row or a column of tiles.
        pair_mean: average over all pairs of places.
        pair_worst: the pair correlation of largest magnitude; where sampled, of the averages by distance.
        second_moment: E[m^2] of a place's multiplier m (0, or the scale); E[m] is 1.
        kept_share_sd: standard deviation of the share of places that a draw keeps.
        gain_sd: standard deviation of a draw's mean multiplier: the scale noise (docs/patterns.md).
        shares, share_probabilities: the distribution of the kept share.
        entropy: of the kept set, in bits; None where there is no closed form.
        log2_models: base-2 logarithm of the number of kept sets that can be drawn; None likewise.
        dropped_columns: expected share of columns of tiles that are dropped whole; None but for `tile`.
    """

    pair_correlations: tuple[float, ...]
    pair_mean: float
    pair_worst: float
    second_moment: float
    kept_share_sd: float
    gain_sd: float
    shares: tuple[float, ...]
    share_probabilities: tuple[float, ...]
    entropy: float | None = None
    log2_models: float | None = None
    dropped_columns: float | None = None


class Bernoulli(Pattern):
    """PyTorch's dropout, each unit on its own: the reference. Never compact, so no option of `dropfx.compile`."""

    name = "bernoulli"

    def fit(self, units: int, rate: float, groups: int = 1) -> Fit:
        """See `Pattern.fit`: meets every rate; no unit is left out of the compact width."""
        return Fit(units, run=1, count=units, numbers=units * groups, drawn_rate=rate, groups=groups)

    def choose(self, hashes: Tensor, fit: Fit) -> list[Draw]:
        """See `Pattern.choose`: starts are all units, and the scale of those that are dropped is 0."""
        points = (hashes >> 10 & 2**53 - 1).to(torch.float64) / 2**53
        shape = (fit.groups, fit.units) if fit.groups > 1 else (fit.units,)
        scales = (points >= fit.drawn_rate).to(torch.float64) * fit.scale
        starts = torch.arange(fit.units).expand(shape)
        return [Draw(starts, 1, scale.view(shape), fit) for scale in scales]


def grid(pattern: Tile, units: int) -> tuple[int, int]:
    """Rows and columns of tiles of a [units, units] weight."""
    return -(-units // pattern.shape[0]), -(-units // pattern.shape[1])


def place_weights(pattern: Pattern, units: int) -> Tensor:
    """float64: 1 for each unit of an axis; the number of tiles on each diagonal r + c, which share their fate."""
    if not isinstance(pattern, Tile):
        return torch.ones(units, dtype=torch.float64)
    rows, columns = grid(pattern, units)
    diagonals = torch.arange(1.0, rows + columns, dtype=torch.float64)
    return torch.minimum(diagonals, diagonals.flip(0)).clamp(max=min(rows, columns))


def exact(pattern: Pattern, fit: Fit, units: int) -> Figures | None:
    """Closed forms for one group of a pattern; None where its class has none.

    Args:
        pattern: the pattern.
        fit: the pattern, fitted to an axis.
        units: length of the axis; `tile`: rows and columns of the weight.
    """
    # by exact type: a subclass may draw otherwise
    kind = type(pattern)
    if kind is Bernoulli:
        return _bernoulli(fit)
    if kind is Block:
        return _block(fit)
    if kind is Slice:
        return _slice(fit)
    if isinstance(pattern, Row) and kind is Row:
        return _lattice(fit, place_weights(pattern, units), by_period=pattern.scale == "period")
    if isinstance(pattern, Tile) and kind is Tile:
        return _lattice(fit, place_weights(pattern, units), rows=grid(pattern, units)[0])
    return None


def worst(correlations: Tensor) -> float:
    """The one of largest magnitude."""
    return float(correlations[correlations.abs().argmax()])


def mean_pair(share_sd: float, places: float, keep: float) -> float:
    """Mean pair correlation c, from Var(kept share) = keep (1 - keep) (1 + (n - 1) c) / n."""
    return (places * share_sd**2 / (keep * (1.0 - keep)) - 1.0) / (places - 1)


def _bernoulli(fit: Fit) -> Figures:
    n, keep = fit.units, fit.keep
    kept = torch.arange(n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(kept + 1) - torch.lgamma(n - kept + 1)
    odds = (ways + kept * math.log(keep) + (n - kept) * math.log1p(-keep)).exp()
    sd = math.sqrt(keep * (1 - keep) / n)
    return Figures(
        pair_correlations=(0.0,) * (n - 1),
        pair_mean=0.0,
        pair_worst=0.0,
        second_moment=fit.scale,
        kept_share_sd=sd,
        gain_sd=sd * fit.scale,
        shares=tuple((kept / n).tolist()),
        share_probabilities=tuple(odds.tolist()),
        entropy=-n * (keep * math.log2(keep) + (1 - keep) * math.log2(1 - keep)),
        log2_models=float(n),
    )


def _block(fit: Fit) -> Figures:
    """k of B blocks: both of two are kept with k(k-1) / (B(B-1)), correlation -1/(B-1); units of a block share fate."""
    n, size, kept = fit.units, fit.run, fit.count
    blocks = -(-n // size)
    last = n - (blocks - 1) * size
    apart = torch.arange(1, n, dtype=torch.float64)
    together = ((blocks - 1) * (size - apart).clamp(min=0) + (last - apart).clamp(min=0)) / (n - apart)
    other = -1.0 / (blocks - 1)
    # the kept share varies with the fate of the last block, where that is shorter
    shares = {kept * size / n: 1.0}
    if last < size:
        shares = {kept * size / n: 1.0 - kept / blocks, ((kept - 1) * size + last) / n: kept / blocks}
    sd = (size - last) / n * math.sqrt(fit.keep * (1.0 - fit.keep))
    bits = math.log2(math.comb(blocks, kept))
    return Figures(
        pair_correlations=tuple((together + (1.0 - together) * other).tolist()),
        pair_mean=mean_pair(sd, n, fit.keep),
        pair_worst=1.0 if size > 1 else other,
        second_moment=fit.scale,
        kept_share_sd=sd,
        gain_sd=sd * fit.scale,
        shares=tuple(shares),
        share_probabilities=tuple(shares.values()),
        entropy=bits,
        log2_models=bits,
    )


def _slice(fit: Fit) -> Figures:
    """Of the n windows of k units max(k-t, 0) + max(k-(n-t), 0) hold both of two units t apart."""
    n, kept = fit.units, fit.run
    apart = torch.arange(1, n, dtype=torch.float64)
    both = ((kept - apart).clamp(min=0) + (kept - n + apart).clamp(min=0)) / n
    correlations = _correlation(both, fit.keep)
    return Figures(
        pair_correlations=tuple(correlations.tolist()),
        pair_mean=mean_pair(0.0, n, fit.keep),
        pair_worst=worst(correlations),
        second_moment=fit.scale,
        kept_share_sd=0.0,
        gain_sd=0.0,
        shares=(kept / n,),
        share_probabilities=(1.0,),
        entropy=math.log2(n),
        log2_models=math.log2(n),
    )


def _lattice(fit: Fit, weights: Tensor, by_period: bool = False, rows: int = 0) -> Figures:
    """Two places t apart are both kept with sum_i d_i / i over the periods i that divide t.

    Args:
        fit: a fit with periods d.
        weights: places at each point of the lattice, one for units, the diagonal's tiles for a weight.
        by_period: the scale is the period, not 1/keep.
        rows: rows of tiles of a weight, 0 for units.
    """
    total = float(weights.sum())
    both = torch.zeros(fit.units, dtype=torch.float64)
    outcomes: dict[float, float] = {}
    columns = square_gain = 0.0
    for period, chance in enumerate(fit.periods, 1):
        if chance == 0.0:
            continue
        both[period::period] += chance / period
        padded = torch.nn.functional.pad(weights, (0, -len(weights) % period))
        counts, biases = padded.view(-1, period).sum(0).unique(return_counts=True)
        scale = float(period) if by_period else fit.scale
        chances = biases.to(torch.float64) * chance / period
        for share, odds in zip((counts / total).tolist(), chances.tolist(), strict=True):
            outcomes[share] = outcomes.get(share, 0.0) + odds
            square_gain += odds * (share * scale - 1.0) ** 2
        columns += chance * max(period - rows, 0) / period
    correlations = _correlation(both[1:], fit.keep)
    sd = math.sqrt(math.fsum(odds * (share - fit.keep) ** 2 for share, odds in outcomes.items()))
    entropy, models = _kept_sets(fit, len(weights))
    diagonal = len(weights) > fit.units  # of several tiles, which share their fate
    return Figures(
        pair_correlations=tuple(correlations.tolist()),
        pair_mean=mean_pair(sd, total, fit.keep),
        pair_worst=1.0 if diagonal else worst(correlations),
        second_moment=sum(i * d for i, d in enumerate(fit.periods, 1)) if by_period else fit.scale,
        kept_share_sd=sd,
        gain_sd=math.sqrt(square_gain),
        shares=tuple(outcomes),
        share_probabilities=tuple(outcomes.values()),
        entropy=entropy,
        log2_models=math.log2(models),
        dropped_columns=columns if rows else None,
    )


def _kept_sets(fit: Fit, points: int) -> tuple[float, int]:
    """Entropy in bits and number of the kept sets of a lattice over `points` points.

    Period and bias can be read from two kept points; draws that keep one point alone are equal whatever the period.
    """
    chances = torch.tensor(fit.periods, dtype=torch.float64)
    periods = torch.arange(1, len(chances) + 1)
    each = chances / periods
    several = torch.minimum(periods, points - periods).clamp(min=0)  # biases that keep two points or more
    # a point b is kept alone by the periods above b that pass the end: b + period >= points
    tail = torch.cat([each.flip(0).cumsum(0).flip(0), each.new_zeros(1)])
    place = torch.arange(points)
    alone = tail[torch.maximum(place, points - place - 1).clamp(max=len(chances))]
    bits = -float(torch.special.xlogy(each, each) @ several.to(each.dtype) + torch.special.xlogy(alone, alone).sum())
    return bits / math.log(2), int(several[each > 0].sum()) + int((alone > 0).sum())


def _correlation(both: Tensor, keep: float) -> Tensor:
    return (both - keep**2) / (keep * (1.0 - keep))
