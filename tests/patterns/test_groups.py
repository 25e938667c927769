"""Several draws a batch: each group follows the law of one, and the groups share the work evenly (stratified)."""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from dropfx.draws.draw_plan import DrawPlan
from dropfx.patterns import Block, Draw, Pattern, Row, Slice
from tests.draws.statistics_of_draws import assert_binomial, assert_uniform, smallest_bias

CASES = [
    (Block(8), 64, 0.5, 2),
    (Block(8), 64, 0.5, 5),
    (Block(8), 64, 0.3, 7),
    (Block(1), 10, 0.7, 4),
    (Block(8), 64, 0.6, 7),
    (Block(16), 100, 0.4, 6),
    (Block(5), 67, 0.8, 35),
    (Block(32), 96, 0.4, 3),
    (Slice(), 64, 0.5, 2),
    (Slice(), 67, 0.3, 5),
    (Slice(), 20, 0.75, 33),
    (Row(), 64, 0.5, 4),
    (Row(5), 67, 0.7, 7),
    (Row(), 4, 0.7, 3),
]
UNEVEN = (Block(8), 64, 0.4, 7)
"""Each of 7 groups drops 3 of 8 blocks: two of them straddle two decks."""


def drawn(pattern: Pattern, units: int, rate: float, groups: int, times: int, seed: int = 0) -> list[Draw]:
    """Draws of one site from `times` numbers."""
    fit = pattern.fit(units, rate, groups=groups)
    assert fit.groups == groups
    plan = DrawPlan(["site"], [fit], pattern, torch.device("cpu"))
    numbers = torch.empty(times, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed))
    return [plan.draw(number)[0] for number in numbers]


def kept(pattern: Pattern, units: int, rate: float, groups: int, times: int, seed: int = 0) -> Tensor:
    """bool [times, groups, units]."""
    draws = drawn(pattern, units, rate, groups, times, seed)
    return torch.stack([draw.mask(torch.float64) > 0 for draw in draws])


@pytest.mark.parametrize(("pattern", "units", "rate", "groups"), CASES)
def test_shapes(pattern: Pattern, units: int, rate: float, groups: int) -> None:
    fit = pattern.fit(units, rate, groups=groups)
    for draw in drawn(pattern, units, rate, groups, 20):
        assert draw.starts.dtype == torch.int64
        assert draw.starts.dim() == 2
        assert len(draw.starts) == groups
        assert not isinstance(pattern, Block) or (draw.starts.diff(dim=-1) > 0).all()
        assert fit.count in (0, draw.starts.size(1))  # 0 where it varies
        assert draw.units().shape == (groups, draw.width)
        assert draw.mask(torch.float32).shape == (groups, units)
        if isinstance(draw.scale, Tensor):
            assert draw.scale.shape == (groups, draw.width)
            assert fit.ragged
        else:
            assert draw.scale == fit.scale


@pytest.mark.parametrize(("pattern", "units", "rate", "groups"), CASES)
def test_rate_and_scale_are_those_of_one_group(pattern: Pattern, units: int, rate: float, groups: int) -> None:
    one, several = pattern.fit(units, rate), pattern.fit(units, rate, groups=groups)
    assert (several.drawn_rate, several.run, several.count) == (one.drawn_rate, one.run, one.count)
    assert several.periods == one.periods


@pytest.mark.parametrize(("pattern", "units", "rate", "groups"), CASES)
def test_no_unit_is_kept_twice_by_a_group(pattern: Pattern, units: int, rate: float, groups: int) -> None:
    """Real positions only: those of scale 0 are padding and may lie anywhere."""
    for draw in drawn(pattern, units, rate, groups, 50):
        real = torch.as_tensor(draw.scale).expand(groups, draw.width) > 0
        for row, its in zip(draw.units(), real, strict=True):
            assert len(set(row[its].tolist())) == int(its.sum()) >= 1


@pytest.mark.parametrize(("pattern", "units", "rate", "groups"), CASES)
def test_padding_has_scale_0_and_the_rest_the_scale(pattern: Pattern, units: int, rate: float, groups: int) -> None:
    fit = pattern.fit(units, rate, groups=groups)
    for draw in drawn(pattern, units, rate, groups, 20):
        mask = draw.mask(torch.float64)
        assert ((mask == 0) | ((mask - fit.scale).abs() < 1e-9)).all()
        if isinstance(draw.scale, Tensor):
            assert torch.equal((draw.scale > 0).sum(1), (mask > 0).sum(1))
            if isinstance(pattern, Block):
                positions = (draw.starts[..., None] + torch.arange(draw.run)).flatten(1)
                assert torch.equal(draw.scale > 0, positions < units)
            else:  # at a unit that the group drops, so that writing it back as 0 harms no kept one
                assert all(len(set(row.tolist())) == draw.width for row in draw.units())


@pytest.mark.parametrize(("pattern", "units", "rate", "groups"), CASES)
def test_groups_share_the_units_evenly(pattern: Pattern, units: int, rate: float, groups: int) -> None:
    """Over the groups of one draw a unit is kept floor or ceil of keep * groups times; `row`: of groups / period."""
    fit = pattern.fit(units, rate, groups=groups)
    for draw in drawn(pattern, units, rate, groups, 60):
        times = (draw.mask(torch.float64) > 0).sum(0)
        expected = groups * fit.keep
        if isinstance(pattern, Row):
            (first,) = (draw.mask(torch.float64)[0] > 0).nonzero(as_tuple=True)
            if len(first) < 2:
                continue  # the period does not show
            expected = groups / int(first[1] - first[0])
        assert times.min() >= math.floor(expected + 1e-9)
        assert times.max() <= math.ceil(expected - 1e-9)


@pytest.mark.parametrize("groups", [2, 3, 7])
def test_blocks_of_one_group_are_any_k_of_n_alike(groups: int) -> None:
    """The first group, one that straddles two decks, the last one."""
    rows = kept(Block(16), 80, 0.4, groups, 2000)
    for group in {0, 1, groups - 1}:
        subsets = [tuple(row[::16].tolist()) for row in rows[:, group]]
        assert {sum(subset) for subset in subsets} == {3}
        assert_uniform(list(subsets), 10)


def test_windows_of_one_group_begin_anywhere() -> None:
    rows = kept(Slice(), 32, 0.5, 3, 2000)
    for group in range(3):
        starts = (rows[:, group] & ~rows[:, group].roll(1, 1)).nonzero()[:, 1]
        assert len(starts) == 2000
        assert_uniform(list(starts.tolist()), 32)


def test_lattices_of_one_group_are_those_of_one_draw() -> None:
    pattern = Row(4)
    fit = pattern.fit(24, 0.6, groups=3)
    rows = kept(pattern, 24, 0.6, 3, 3000)
    for group in range(3):
        sets = Counter(tuple(row.nonzero().flatten().tolist()) for row in rows[:, group])
        for period, bias in ((p, b) for p in range(1, 5) for b in range(p)):
            assert_binomial([sets[tuple(range(bias, 24, period))]], 3000, fit.periods[period - 1] / period)


def test_the_groups_of_a_draw_have_one_period() -> None:
    for draw in drawn(Row(), 64, 0.5, 6, 50):
        counts = (draw.mask(torch.float64) > 0).sum(1)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("pattern", "units", "rate", "groups"),
    [UNEVEN, (Block(8), 64, 0.6, 7), (Block(5), 33, 0.5, 3), (Slice(), 40, 0.3, 3)],
)
def test_every_unit_is_equally_likely_in_every_group(pattern: Pattern, units: int, rate: float, groups: int) -> None:
    """Exact binomial tests by Bonferroni over units and groups, steps as replicates; false alarms below 1e-6."""
    trials = 4000
    fit = pattern.fit(units, rate, groups=groups)
    dropped = (~kept(pattern, units, rate, groups, trials)).sum(0)
    assert_binomial(dropped.flatten().tolist(), trials, fit.drawn_rate, significance=1e-6)
    assert smallest_bias(trials, fit.drawn_rate, units * groups, significance=1e-6) < 0.07


def test_every_unit_is_equally_likely_in_every_group_of_rows() -> None:
    trials = 4000
    dropped = (~kept(Row(4), 20, 0.6, 3, trials)).sum(0)
    assert_binomial(dropped.flatten().tolist(), trials, 0.6, significance=1e-6)


def test_pairs_of_groups_are_less_alike_than_independent_draws() -> None:
    """Two groups of half of the blocks each share no block; drawn on their own they would share half of theirs."""
    for rows in kept(Block(8), 64, 0.5, 2, 30):
        assert torch.equal(rows[0], ~rows[1])


@pytest.mark.parametrize(("rate", "kept_blocks"), [(0.4, 3), (0.6, 2)], ids=["dropped are dealt", "kept are dealt"])
def test_straddling_groups_do_not_favour_neighbours(rate: float, kept_blocks: int) -> None:
    """Pairs of blocks in the group that straddles two decks: all k(k-1) / n(n-1) likely."""
    rows = kept(Block(1), 5, rate, 3, 3000)[:, 2]
    together = [int((rows[:, a] & rows[:, b]).sum()) for a, b in itertools.combinations(range(5), 2)]
    assert_binomial(together, 3000, kept_blocks * (kept_blocks - 1) / (5 * 4))


def test_one_group_is_no_extra_dimension() -> None:
    for pattern in (Block(8), Slice(), Row()):
        for draw in drawn(pattern, 64, 0.5, 1, 5):
            assert draw.starts.dim() == 1
