"""Promise 3: which units are kept. Marginals, subsets and independence, by exact binomial tests."""

from __future__ import annotations

import pytest
import torch

import dropfx
from dropfx.patterns import Block
from tests.catalogue import CASES
from tests.catalogue.case import recording
from tests.draws.statistics_of_draws import (
    assert_binomial,
    assert_uniform,
    block_kept,
    compiled,
    draws,
    same,
    site_report,
    window_start,
)

PATTERNS = ("block", "slice")


MARGINALS = [(64, 0.3, "block"), (100, 0.7, Block(16)), (64, 0.5, "slice"), (67, 0.2, "slice")]


@pytest.mark.parametrize(("units", "p", "pattern"), MARGINALS)
def test_marginals(units: int, p: float, pattern: object) -> None:
    """P(unit dropped) is the drawn rate for every unit."""
    rate = site_report(units, p, pattern).drawn_rate
    dropped = (draws(compiled(units, p, pattern), 2000)["1"] == 0).sum(0)
    assert_binomial(dropped.tolist(), 2000, rate)


def test_marginals_over_consecutive_seeds() -> None:
    model = compiled(64, 0.5, Block(8))
    dropped = sum((draws(model, 1, seed=seed)["1"][0] == 0).long() for seed in range(1000))
    assert_binomial(dropped.tolist(), 1000, 0.5)


def test_expectation_is_the_identity() -> None:
    for pattern in PATTERNS:
        masks = draws(compiled(96, 0.3, pattern), 1000)["1"]
        assert masks.mean().item() == pytest.approx(1.0, abs=1e-9)
        assert (masks.mean(0) - 1.0).abs().max() < 5 * masks.std() / 1000**0.5


def test_block_subsets_are_uniform() -> None:
    rows = draws(compiled(64, 0.5, Block(16)), 3000)["1"] != 0
    assert_uniform([block_kept(row, 16) for row in rows], 6)


def test_slice_starts_are_uniform() -> None:
    rows = draws(compiled(32, 0.5, "slice"), 3000)["1"] != 0
    assert_uniform([window_start(row) for row in rows], 32)


def test_sites_are_independent() -> None:
    masks = draws(compiled(64, 0.5, Block(16), sites=3), 2500)
    assert set(masks) == {"1", "3", "5"}
    subsets = {name: [block_kept(row != 0, 16) for row in rows] for name, rows in masks.items()}
    for one, other in (("1", "3"), ("3", "5"), ("1", "5")):
        assert_uniform(list(zip(subsets[one], subsets[other], strict=True)), 36)


def test_slices_of_two_sites_are_independent() -> None:
    masks = draws(compiled(8, 0.5, "slice", sites=2), 2500)
    starts = [[window_start(row != 0) for row in masks[name]] for name in ("1", "3")]
    assert_uniform(list(zip(*starts, strict=True)), 64)


def test_steps_are_independent() -> None:
    subsets = [block_kept(row != 0, 16) for row in draws(compiled(64, 0.5, Block(16)), 4000)["1"]]
    assert_uniform(list(zip(subsets[::2], subsets[1::2], strict=True)), 36)


def test_consecutive_seeds_are_independent() -> None:
    model = compiled(64, 0.5, Block(16))
    subsets = [block_kept(draws(model, 1, seed=seed)["1"][0] != 0, 16) for seed in range(2000)]
    assert_uniform(list(zip(subsets[::2], subsets[1::2], strict=True)), 36)


def test_calls_of_a_shared_dropout_draw_their_own() -> None:
    model = dropfx.compile(CASES["shared_dropout"].make(), min_speedup=0)
    x = torch.ones(1, 64)
    with dropfx.testing.record() as recorded:
        for _ in range(10):
            model(x)
    for one, other in (("drop", "drop#3"), ("drop", "drop#2")):
        assert any(not same(masks[one], masks[other]) for masks in recorded)


def test_channel_dropout_drops_whole_channels() -> None:
    model = dropfx.compile(CASES["dropout2d_flatten"].make(), min_speedup=0)
    with recording() as masks:
        model(torch.randn(3, 3, 4, 4))
    if "2" in masks:  # only where the site is rewritten
        shape = torch.broadcast_shapes(masks["2"].shape, (3, 64, 4, 4))
        assert shape == (3, 64, 4, 4)
        assert masks["2"].expand(shape).flatten(2).unique(dim=2).shape[2] == 1
