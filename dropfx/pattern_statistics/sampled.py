"""A pattern's statistics by drawing from it, through the code that training draws with."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dropfx.draws.draw_plan import DrawPlan, site_key
from dropfx.pattern_statistics.exact import Figures, mean_pair, place_weights, worst
from dropfx.patterns import Fit, Pattern, TileDraw

_AT_ONCE = 2**19
"""Multipliers held at once."""


class Sample(NamedTuple):
    """What a number of draws showed.

    Attributes:
        marginals: share of the draws that dropped each place; tiles: those of each diagonal r + c.
        figures: as `Figures` says, entropy apart.
        groups_keeping: fewest and most groups of one draw that kept a place.
        group_correlation: of a place's keep indicators in two groups of a draw, averaged; None of one group.
    """

    marginals: tuple[float, ...]
    figures: Figures
    groups_keeping: tuple[int, int]
    group_correlation: float | None


def masks(pattern: Pattern, fit: Fit, places: int, steps: int) -> Iterator[Tensor]:
    """Multipliers float64 [groups, places] of successive draws; of tiles those of the diagonals r + c.

    The numbers that the draws are made from are fixed: no generator is read or moved.
    """
    plan = DrawPlan(["statistics"], [fit], pattern, torch.device("cpu"))
    for step in range(steps):
        (draw,) = plan.draw(torch.tensor(site_key(f"step {step}") - 2**63))
        if isinstance(draw, TileDraw):
            yield draw.mask(1, places, (1, 1), torch.float64)
        else:
            yield draw.mask(torch.float64).view(fit.groups, places)


def sample(pattern: Pattern, fit: Fit, units: int, samples: int, pairs: bool = True) -> Sample:
    """Statistics of `samples` draws; `units` as in `exact`; pair correlations by distance only where `pairs`."""
    weights, keep, groups = place_weights(pattern, units), fit.keep, fit.groups
    places, total, draws = len(weights), float(weights.sum()), samples * groups
    kept_count = torch.zeros(places, dtype=torch.float64)
    spectrum = torch.zeros(places + 1, dtype=torch.float64)
    shares: Counter[float] = Counter()
    square_multiplier = square_gain = square_groups = 0.0
    fewest, most = groups, 0
    drawn = masks(pattern, fit, places, samples)
    while some := list(itertools.islice(drawn, max(_AT_ONCE // (groups * places), 1))):
        mask = torch.stack(some)
        kept = (mask > 0).to(torch.float64)
        together = kept.sum(1)
        kept_count += together.sum(0)
        fewest, most = min(fewest, int(together.min())), max(most, int(together.max()))
        square_groups += float(together.square().mean(1).sum())
        shares.update((kept @ weights / total).flatten().tolist())
        square_gain += float((mask @ weights / total - 1.0).square().sum())
        square_multiplier += float((mask.square() @ weights).sum()) / total
        if pairs:  # products of all pairs, summed by distance: the inverse transform of the power spectrum
            spectrum += torch.fft.rfft(kept - keep, 2 * places).abs().square().sum((0, 1))
    apart = torch.arange(1, fit.units, dtype=torch.float64)
    products = torch.fft.irfft(spectrum, 2 * places)[1 : fit.units]
    correlations = products / (draws * (places - apart) * keep * (1 - keep))
    sd = math.sqrt(sum(times * (share - keep) ** 2 for share, times in shares.items()) / draws)
    figures = Figures(
        pair_correlations=tuple(correlations.tolist()) if pairs else (),
        pair_mean=mean_pair(sd, total, keep),
        pair_worst=worst(correlations),
        second_moment=square_multiplier / draws,
        kept_share_sd=sd,
        gain_sd=math.sqrt(square_gain / draws),
        shares=tuple(shares),
        share_probabilities=tuple(times / draws for times in shares.values()),
    )
    between = None
    if groups > 1:
        covariances = square_groups / samples - groups * keep - groups * (groups - 1) * keep**2
        between = covariances / (groups * (groups - 1) * keep * (1 - keep))
    return Sample(tuple((1.0 - kept_count / draws).tolist()), figures, (fewest, most), between)
