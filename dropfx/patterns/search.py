"""Search for the distribution of periods whose expected drop rate is the one asked for.

A lattice of period i keeps every i-th unit and drops the share (i-1)/i; each forward draws its period from d, so
that a unit is dropped with probability sum_i d_i (i-1)/i.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dropfx.errors import InvalidOption

_METHODS = ("exact", "sgd")
_STEPS, _RATE_WEIGHT, _LEARNING_RATE, _FLAT = 20_000, 0.99, 5.0, 1e-12
_MARGIN = 0.05


def default_max_period(rate: float) -> int:
    """The smallest N with (N-1)/N >= rate + .05: longer periods make the kept share noisy and cost accuracy.

    Near 1 the margin shrinks to half of what is left.
    """
    target = rate + min(_MARGIN, (1.0 - rate) / 2)
    return max(2, math.ceil(1.0 / (1.0 - target) - 1e-9))


def search(rate: float, max_period: int, method: str = "exact") -> Tensor:
    """Distribution d of the periods 1..max_period with sum_i d_i (i-1)/i = rate.

    "exact" is the distribution of largest entropy that meets the rate, d_i ~ exp(theta * (i-1)/i), its theta found as
    the root of a monotone function. "sgd" is the search of Approximate Random Dropout (arXiv 1805.08939): gradient
    steps on v, d = softmax(v), loss .99 * (rate(d) - rate)^2 + .01 * mean(d log d); it misses the rate by about .002.

    Args:
        rate: drop probability, 0 <= rate <= (max_period-1)/max_period.
        max_period: number of periods N, at least 1.
        method: "exact" or "sgd".

    Returns:
        float64 [max_period]; entry 0 is the probability of period 1, which drops nothing.

    Raises:
        InvalidOption (ValueError): an argument is outside of its range, or no distribution meets the rate.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise InvalidOption(f"rate: got {rate!r}, accepted are numbers in [0, 1)")
    if isinstance(max_period, bool) or not isinstance(max_period, int) or max_period < 1:
        raise InvalidOption(f"max_period: got {max_period!r}, accepted are integers >= 1")
    if method not in _METHODS:
        raise InvalidOption(f"method: got {method!r}, accepted are 'exact' and 'sgd'")
    highest = (max_period - 1) / max_period
    if rate > highest:
        raise InvalidOption(
            f"rate: got {rate!r}, but periods up to max_period={max_period} drop at most {highest:.4g} of the units"
        )
    periods = torch.arange(1, max_period + 1, dtype=torch.float64)
    dropped = (periods - 1) / periods
    if rate in (0, highest):
        return (dropped == rate).to(torch.float64)
    return _exact(float(rate), dropped) if method == "exact" else _sgd(float(rate), dropped)


def _exact(rate: float, dropped: Tensor) -> Tensor:
    """Bisection on theta in t = theta / (1 + |theta|), which is bounded; the mean grows with theta."""
    shares = dropped.tolist()

    def distribution(t: float) -> list[float]:
        """Probabilities of the periods, d_i ~ exp(theta * share_i), theta = t / (1 - |t|) for -1 < t < 1."""
        theta = t / (1.0 - abs(t))
        top = max(theta * share for share in shares)
        weights = [math.exp(theta * share - top) for share in shares]
        total = math.fsum(weights)
        return [weight / total for weight in weights]

    def excess(t: float) -> float:
        """By how much the rate of that distribution is above the one asked for; grows with t."""
        return math.fsum(d * share for d, share in zip(distribution(t), shares, strict=True)) - rate

    low, high = math.nextafter(-1.0, 0.0), math.nextafter(1.0, 0.0)
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    best = min((low, high), key=lambda t: abs(excess(t)))
    return torch.tensor(distribution(best), dtype=torch.float64)


def _sgd(rate: float, dropped: Tensor) -> Tensor:
    v = torch.zeros_like(dropped)
    for _ in range(_STEPS):
        d = v.softmax(0)
        excess = d @ dropped - rate
        by_d = _RATE_WEIGHT * 2 * excess * dropped + (1 - _RATE_WEIGHT) * (d.log() + 1) / len(d)
        by_v = d * (by_d - d @ by_d)  # through the softmax
        v -= _LEARNING_RATE * by_v
        if float(by_v.abs().max()) < _FLAT:
            break
    return v.softmax(0)
