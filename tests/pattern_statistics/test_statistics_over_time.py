"""What draws share over steps and sequences, against the closed forms of docs/patterns.md.

d = m - 1 is what a unit's multiplier m adds to its mean, V the variance of the mean of m over all steps and sequences,
rho the mean correlation of two steps (or sequences) that differ.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dropfx
from dropfx.patterns import search
from tests.catalogue.cells import OneMask
from tests.draws.statistics_of_draws import SIGNIFICANCE, p_value

UNITS, STEPS, BATCH, TIMES = 64, 7, 3, 200


class Sequences(nn.Module):
    """Linear, dropout and an LSTM, over [T, B, units] or, with the batch first, [B, T, units]."""

    def __init__(self, p: float, batch_first: bool) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(UNITS, UNITS), nn.Dropout(p)
        self.lstm = nn.LSTM(UNITS, UNITS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.drop(self.linear(x)))[0]


class EachStep(nn.Module):
    """A dropout that a loop calls at each step."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.cell, self.drop = nn.GRUCell(UNITS, UNITS), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(1), UNITS)
        for step in x:
            h = self.cell(self.drop(step), h)
        return h


def multipliers(
    p: float, groups: int | str, batch_first: bool = False, pattern: str = "block", sequences: int = BATCH
) -> Tensor:
    """[draws, T, B, units]."""
    model = dropfx.compile(Sequences(p, batch_first), groups=groups, pattern=pattern, min_speedup=0)
    recorded = forwards(model, (sequences, STEPS) if batch_first else (STEPS, sequences))
    shape = (sequences, STEPS, UNITS) if batch_first else (STEPS, sequences, UNITS)
    found = torch.stack([masks["drop"].expand(shape) for masks in recorded])
    return found.transpose(1, 2) if batch_first else found


def forwards(model: nn.Module, leading: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """What so many forwards record."""
    model, x = model.double(), torch.ones(*leading, UNITS, dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad(), dropfx.testing.record() as recorded:
        for _ in range(TIMES):
            model(x)
    return recorded


class Found(NamedTuple):
    """Estimates with their standard errors over the draws; units of a draw depend on each other."""

    value: float
    error: float

    def agrees_with(self, expected: float) -> bool:
        return abs(self.value - expected) <= 5 * self.error + 1e-12


def over_draws(each: Tensor) -> Found:
    """Mean of [draws, ...]."""
    by_draw = each.flatten(1).mean(1)
    return Found(float(by_draw.mean()), float(by_draw.std()) / math.sqrt(len(by_draw)))


def variance_of_mean(m: Tensor) -> Found:
    return over_draws((m.mean((1, 2)) - 1) ** 2)


def correlation(m: Tensor, p: float, dim: int) -> Found:
    """Mean over the pairs of two different positions of axis `dim`: 1 is steps, 2 sequences."""
    d, count = m - 1, m.size(dim)
    pairs = (d.sum(dim) ** 2 - (d**2).sum(dim)) / (count * (count - 1))
    return over_draws(pairs * (1 - p) / p)


def stratified(p: float, groups: int) -> tuple[float, float]:
    """(V, rho) of `groups` stratified draws, which keep a unit floor or ceil of groups (1-p) times."""
    kept = groups * (1 - p)
    rest = kept - math.floor(kept)
    variance = rest * (1 - rest) / kept**2
    return variance, (groups * variance * (1 - p) / p - 1) / (groups - 1)


@pytest.mark.parametrize("p", [0.25, 0.5])
@pytest.mark.parametrize("batch_first", [False, True])
def test_one_draw_for_all(batch_first: bool, p: float) -> None:
    """groups=1: correlation 1 over steps and sequences, V = p/(1-p)."""
    m = multipliers(p, 1, batch_first)
    assert torch.equal(m, m[:, :1, :1].expand_as(m))
    assert variance_of_mean(m).agrees_with(p / (1 - p))
    assert correlation(m, p, 1).agrees_with(1.0)
    assert correlation(m, p, 2).agrees_with(1.0)


@pytest.mark.parametrize("p", [0.25, 0.5])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("pattern", ["block", "slice"])
def test_a_draw_a_step(pattern: str, batch_first: bool, p: float) -> None:
    """groups="time": correlation 1 over sequences, V and rho over steps those of T stratified draws."""
    m = multipliers(p, "time", batch_first, pattern)
    variance, rho = stratified(p, STEPS)
    assert torch.equal(m, m[:, :, :1].expand_as(m))
    assert variance_of_mean(m).agrees_with(variance)
    assert correlation(m, p, 1).agrees_with(rho)
    # the law of each unit, not of their mean alone
    kept = (m[:, :, 0] > 0).sum(1)
    low = math.floor(STEPS * (1 - p))
    assert set(kept.unique().tolist()) <= {low, low + 1}
    for more in (kept > low).sum(0).tolist():
        assert p_value(more, TIMES, STEPS * (1 - p) - low) > SIGNIFICANCE / UNITS


def test_steps_of_periods() -> None:
    """pattern="row": the steps share a period i, which keeps a unit floor or ceil of T/i times."""
    p, scale = 0.5, 2.0
    m = multipliers(p, "time", pattern="row")
    expected = -1.0
    for period, chance in enumerate(search(p, 3).tolist(), 1):
        rest = STEPS / period - STEPS // period
        expected += chance * (rest * (1 - rest) + (STEPS / period) ** 2) * (scale / STEPS) ** 2
    assert torch.equal(m, m[:, :, :1].expand_as(m))
    assert variance_of_mean(m).agrees_with(expected)
    assert correlation(m, p, 1).agrees_with((STEPS * expected * (1 - p) / p - 1) / (STEPS - 1))


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_a_draw_a_sequence(p: float) -> None:
    """groups=B with the batch first: correlation 1 over steps, V and rho over sequences those of B stratified draws."""
    m = multipliers(p, BATCH, batch_first=True)
    variance, rho = stratified(p, BATCH)
    assert torch.equal(m, m[:, :1].expand_as(m))
    assert variance_of_mean(m).agrees_with(variance)
    assert correlation(m, p, 2).agrees_with(rho)


def test_a_draw_for_some_sequences() -> None:
    """groups=2 for 6 sequences: V that of 2 draws; two sequences are of one chunk in 2 of 5 pairs."""
    p = 0.25
    m = multipliers(p, 2, batch_first=True, sequences=6)
    variance, rho = stratified(p, 2)
    assert torch.equal(m[:, :, :3], m[:, :, :1].expand_as(m[:, :, :3]))
    assert variance_of_mean(m).agrees_with(variance)
    assert correlation(m, p, 2).agrees_with((2 + 3 * rho) / 5)


def test_a_call_a_step() -> None:
    """A dropout called in a loop: correlation 0 over steps, 1 over sequences, V = p/(1-p)/T."""
    p = 0.25
    recorded = forwards(dropfx.compile(EachStep(p), min_speedup=0), (STEPS, BATCH))
    names = ["drop", *(f"drop#{call}" for call in range(2, STEPS + 1))]
    m = torch.stack([torch.stack([masks[name] for name in names]) for masks in recorded])[:, :, None]
    assert variance_of_mean(m).agrees_with(p / (1 - p) / STEPS)
    assert correlation(m, p, 1).agrees_with(0.0)


def test_one_mask_by_hand_of_all_steps() -> None:
    """Multiplied in at each step of a loop, it is one draw for steps and sequences."""
    model = dropfx.compile(OneMask("bernoulli", "state", nn.LSTMCell(UNITS, 96)), groups="time", min_speedup=0)
    recorded = forwards(model, (BATCH, STEPS))
    m = torch.stack([masks[":bernoulli_1"] for masks in recorded])
    assert m.shape == (TIMES, 96)
    assert variance_of_mean(m[:, None, None]).agrees_with(1 / 3)
