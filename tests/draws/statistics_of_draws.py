"""Masks of many forwards as tables, and exact binomial tests on them."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

import dropfx

# Chance that a right implementation fails one test; the seeds are fixed, so that a pass stays a pass.
SIGNIFICANCE = 1e-3


def site_model(units: int, p: float, sites: int = 1) -> nn.Sequential:
    """Linear, then Dropout and Linear `sites` times; its sites are "1", "3", ..."""
    layers: list[nn.Module] = [nn.Linear(2, units)]
    for _ in range(sites - 1):
        layers += [nn.Dropout(p), nn.Linear(units, units)]
    return nn.Sequential(*layers, nn.Dropout(p), nn.Linear(units, 2)).double()


def compiled(units: int, p: float, pattern: object = "block", sites: int = 1) -> nn.Module:
    return dropfx.compile(site_model(units, p, sites), pattern=pattern, min_speedup=0)


def site_report(units: int, p: float, pattern: object) -> Any:
    model, x = site_model(units, p), torch.ones(1, 2, dtype=torch.float64)
    (site,) = dropfx.explain(model, x, options={"pattern": pattern, "min_speedup": 0}).sites
    return site


def draws(model: nn.Module, times: int, seed: int = 0, batch: int = 1) -> dict[str, Tensor]:
    """Site -> [times, units] multipliers of consecutive training forwards."""
    x = torch.ones(batch, model[0].in_features, dtype=torch.float64)
    torch.manual_seed(seed)
    with torch.no_grad(), dropfx.testing.record() as recorded:
        for _ in range(times):
            model(x)
    assert len(recorded) == times
    return {name: torch.stack([masks[name].flatten() for masks in recorded]) for name in recorded[0]}


@functools.lru_cache(maxsize=1024)
def cumulative(trials: int, probability: float) -> Tensor:
    """P(X <= c) for c = 0..trials, X binomial."""
    c = torch.arange(trials + 1, dtype=torch.float64)
    choose = math.lgamma(trials + 1) - torch.lgamma(c + 1) - torch.lgamma(trials - c + 1)
    return (choose + c * math.log(probability) + (trials - c) * math.log1p(-probability)).exp().cumsum(0)


def p_value(count: int, trials: int, probability: float) -> float:
    """Two-sided exact binomial test."""
    below = cumulative(trials, probability)
    above = 1.0 - (float(below[count - 1]) if count else 0.0)
    return min(1.0, 2.0 * min(float(below[count]), above))


def assert_binomial(counts: list[int], trials: int, probability: float, significance: float = SIGNIFICANCE) -> None:
    """No count lies further out than chance allows, by Bonferroni over the counts.

    Bonferroni holds whatever the dependence: units of one draw share their fate, so that a chi-square over them would
    be wrong; `trials` must be steps, which are independent.
    """
    worst = min(p_value(count, trials, probability) for count in counts)
    message = f"p = {worst:.2g} among {len(counts)} counts, {counts[:8]} ..., expected {trials * probability:g}"
    assert worst * len(counts) > significance, message


def smallest_bias(
    trials: int, probability: float, tests: int, significance: float = SIGNIFICANCE, power: float = 0.99
) -> float:
    """The least bias of one of `tests` units that `assert_binomial` catches with at least `power`, either way."""
    allowed = significance / tests
    low = next(c for c in range(trials + 1) if p_value(c, trials, probability) > allowed)
    high = next(c for c in range(trials, -1, -1) if p_value(c, trials, probability) > allowed)

    def caught(true: float) -> float:
        below = cumulative(trials, true)
        return (float(below[low - 1]) if low else 0.0) + 1.0 - float(below[high])

    def needed(sign: int, room: float) -> float:
        none, enough = 0.0, room * (1 - 1e-9)
        assert caught(probability + sign * enough) >= power, "too few trials to catch any bias"
        for _ in range(40):
            middle = (none + enough) / 2
            none, enough = (none, middle) if caught(probability + sign * middle) >= power else (middle, enough)
        return enough

    return max(needed(-1, probability), needed(1, 1 - probability))


def assert_uniform(outcomes: list[object], classes: int) -> None:
    """The outcomes take all `classes` values, each equally often."""
    counts = Counter(outcomes)
    assert len(counts) <= classes
    padded = list(counts.values()) + [0] * (classes - len(counts))
    assert_binomial(padded, len(outcomes), 1.0 / classes)


def window_start(kept: Tensor) -> int:
    """Where the kept units, one cyclic window, begin."""
    starts = (kept & ~kept.roll(1)).nonzero().flatten().tolist()
    assert len(starts) == 1, f"{len(starts)} windows"
    return int(starts[0])


def block_kept(kept: Tensor, size: int) -> tuple[bool, ...]:
    """Whether each block is kept; every block wholly or not at all."""
    blocks = kept.split(size)
    assert all(bool(block.all()) or not block.any() for block in blocks)
    return tuple(bool(block[0]) for block in blocks)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal multipliers, whatever axes of size 1 are before the units."""
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())
