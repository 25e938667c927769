"""`row` and `tile`: the periods fitted to an axis, what a draw keeps, scales, and what is refused."""

import math

import pytest
import torch
from torch import Tensor

from dropfx.draws.draw_plan import DrawPlan
from dropfx.errors import InvalidOption
from dropfx.patterns import Pattern, PatternRefused, Row, Tile, search
from tests.draws.statistics_of_draws import assert_binomial

PERIODS_BY_RATE = [(0.01, 2), (0.3, 2), (0.45, 2), (0.5, 3), (0.6, 3), (0.7, 4), (0.9, 20)]
AXES = [(64, 0.5), (67, 0.3), (100, 0.7), (5, 0.7), (4, 0.74), (2, 0.5), (3, 0.4)]


def hashes(times: int, seed: int = 0) -> Tensor:
    """Two numbers a draw, as the hash makes them: not negative, 63 bits."""
    return torch.randint(2**63 - 1, (times, 2), generator=torch.Generator().manual_seed(seed))


def drawn(pattern: Pattern, units: int, rate: float, times: int, seed: int = 0) -> list:
    """Draws of one site from `times` numbers, through the code that training draws with."""
    plan = DrawPlan(["site"], [pattern.fit(units, rate)], pattern, torch.device("cpu"))
    numbers = torch.empty(times, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed))
    return [plan.draw(number)[0] for number in numbers]


def lattice(units: int, period: int, bias: int) -> Tensor:
    return (torch.arange(units) - bias) % period == 0


def outcomes(pattern: Row, units: int, rate: float) -> dict[tuple[int, int], Tensor]:
    """The multiplier of every (period, bias), from the pattern itself at hashes that lead there."""
    fit = pattern.fit(units, rate)
    ends = torch.tensor(fit.periods, dtype=torch.float64).cumsum(0).tolist()
    found = {}
    for period, (end, chance) in enumerate(zip(ends, fit.periods, strict=True), 1):
        for bias in range(period if chance else 0):
            (kept,) = pattern.choose(torch.tensor([[int((end - chance / 2) * 2**63), bias]]), fit)
            mask = torch.zeros(units, dtype=torch.float64)
            mask[(kept.starts[:, None] + torch.arange(kept.run)).flatten()] = kept.scale
            found[period, bias] = mask
    return found


# -- fitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "longest"), PERIODS_BY_RATE)
@pytest.mark.parametrize("pattern", [Row(), Tile()])
def test_default_longest_period(pattern: Pattern, rate: float, longest: int) -> None:
    """The smallest N with (N-1)/N >= rate + .05."""
    assert len(pattern.fit(100, rate).periods) == longest
    assert (longest - 1) / longest >= rate + 0.05 - 1e-9
    assert longest == 2 or (longest - 2) / (longest - 1) < rate + 0.05


@pytest.mark.parametrize("pattern", [Row(16), Tile(max_period=16)])
def test_longest_period_never_exceeds_the_units(pattern: Pattern) -> None:
    assert len(pattern.fit(100, 0.5).periods) == 16
    assert len(pattern.fit(5, 0.5).periods) == 5


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("pattern", [Row(), Row(200), Tile()])
def test_periods_are_searched_and_meet_the_rate(pattern: Pattern, rate: float) -> None:
    fit = pattern.fit(400, rate)
    assert fit.drawn_rate == rate
    assert list(fit.periods) == search(rate, len(fit.periods)).tolist()
    drop = math.fsum(d * (i - 1) / i for i, d in enumerate(fit.periods, 1))
    assert drop == pytest.approx(rate, abs=1e-12)
    assert fit.scale == pytest.approx(1 / (1 - rate), abs=1e-9)
    assert (fit.run, fit.count, fit.numbers, fit.ragged) == (1, 0, 2, False)


def test_rate_of_the_longest_period_alone() -> None:
    assert Row(4).fit(64, 0.75).periods == (0.0, 0.0, 0.0, 1.0)


def test_rate_just_above_the_longest_period_is_drawn_a_little_lower() -> None:
    assert Row(4).fit(64, 0.76).drawn_rate == 0.75


@pytest.mark.parametrize(
    ("pattern", "units", "rate", "words"),
    [
        (Row(), 1, 0.5, r"an axis of 1 unit\(s\) is too short"),
        (Row(2), 64, 0.7, "periods up to 2 drop at most 0.5 of the units, less than 0.7"),
        (Row(), 3, 0.9, "periods up to 3 drop at most 0.667 of the units, less than 0.9"),
        (Tile((16, 32)), 1, 0.5, "a weight of a single 16x32 tile has no tile to drop"),
        (Tile(max_period=3), 64, 0.9, "periods up to 3 drop at most 0.667"),
    ],
)
def test_refusals(pattern: Pattern, units: int, rate: float, words: str) -> None:
    with pytest.raises(PatternRefused, match=words):
        pattern.fit(units, rate)


def test_tiles_have_no_groups() -> None:
    with pytest.raises(PatternRefused, match="groups must be 1"):
        Tile().fit(64, 0.5, groups=2)


@pytest.mark.parametrize("period", [0, 1, -2, 2.0, True, "4"])
def test_bad_period(period: object) -> None:
    for pattern in (Row, Tile):
        with pytest.raises(InvalidOption, match=r"max_period: got .*, accepted are None and integers >= 2"):
            pattern(max_period=period)


@pytest.mark.parametrize("scale", ["local", None, 1.0])
def test_bad_scale(scale: object) -> None:
    with pytest.raises(InvalidOption, match=r"scale: got .*, accepted are 'global' and 'period'"):
        Row(scale=scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [32, (32,), (32, 32, 32), (0, 32), (32, -1), (32.0, 32), (True, 32), "ab", None])
def test_bad_shape(shape: object) -> None:
    with pytest.raises(InvalidOption, match=r"shape: got .*, accepted are two integers >= 1"):
        Tile(shape=shape)  # type: ignore[arg-type]


def test_shape_may_be_a_list() -> None:
    assert Tile(shape=[16, 8]) == Tile((16, 8))  # type: ignore[arg-type]


# -- row ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "rate"), AXES)
@pytest.mark.parametrize("longest", [None, 6])
def test_kept_units_are_the_lattice(units: int, rate: float, longest: int | None) -> None:
    found = outcomes(Row(longest), units, rate)
    assert len(found) > 1
    for (period, bias), mask in found.items():
        assert torch.equal(mask > 0, lattice(units, period, bias))


@pytest.mark.parametrize(("units", "rate"), AXES)
def test_every_draw_keeps_a_lattice(units: int, rate: float) -> None:
    pattern = Row(min(units, 8))
    for draw in drawn(pattern, units, rate, 100):
        kept = draw.mask(torch.float64) > 0
        (places,) = kept.nonzero(as_tuple=True)
        period = int(places.diff()[0]) if len(places) > 1 else units
        assert torch.equal(kept, lattice(units, period, int(places[0])))
        assert draw.width == len(places) >= 1


def test_period_one_keeps_all_units_as_one_run() -> None:
    (kept,) = Row().choose(torch.tensor([[0, 5]]), Row().fit(64, 0.3))
    assert (kept.starts.tolist(), kept.run) == ([0], 64)


@pytest.mark.parametrize("scale", ["global", "period"])
@pytest.mark.parametrize(("units", "rate"), AXES)
def test_both_scales_are_unbiased(units: int, rate: float, scale: str) -> None:
    """E[multiplier] over all (period, bias) is 1 for every unit; and so is, with the scale "period", every period's."""
    pattern = Row(min(units, 6), scale=scale)
    fit = pattern.fit(units, rate)
    found = outcomes(pattern, units, rate)
    mean = sum(fit.periods[period - 1] / period * mask for (period, _), mask in found.items())
    assert torch.allclose(mean, torch.ones(units, dtype=torch.float64), atol=1e-12)
    if scale == "period":
        for period in {period for period, _ in found}:
            assert sum(found[period, bias] for bias in range(period)).eq(period).all()


def test_global_scale_has_the_second_moment_of_independent_dropout() -> None:
    squares = {}
    for scale in ("global", "period"):
        pattern = Row(16, scale)
        fit = pattern.fit(64, 0.7)
        found = outcomes(pattern, 64, 0.7).items()
        squares[scale] = float(sum(fit.periods[period - 1] / period * mask[7] ** 2 for (period, _), mask in found))
    assert squares["global"] == pytest.approx(1 / 0.3, abs=1e-9)
    assert squares["period"] == pytest.approx(7.34, abs=0.01)  # E[period]


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_periods_and_biases_come_as_often_as_searched(rate: float) -> None:
    """From the hashes of training: a number that misses a part of its range would change the rate."""
    times, pattern = 4000, Tile(max_period=4)
    fit = pattern.fit(64, rate)
    draws = drawn(pattern, 64, rate, times)
    for period, chance in enumerate(fit.periods, 1):
        biases = [draw.bias for draw in draws if draw.period == period]
        assert_binomial([len(biases)], times, chance)
        assert_binomial([biases.count(bias) for bias in range(period)], times, chance / period)


def test_draws_follow_the_number() -> None:
    one, again, other = (drawn(Row(), 64, 0.5, 20, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a.starts, b.starts) for a, b in zip(one, again, strict=True))
    assert any(a.starts.tolist() != b.starts.tolist() for a, b in zip(one, other, strict=True))


# -- tile -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "tiles"), [(64, 64, 2), (65, 64, 3), (32, 500, 16), (100, 31, 4), (1, 1, 1)]
)
def test_tiles_along_the_longer_side(rows: int, columns: int, tiles: int) -> None:
    assert Tile().tiles(rows, columns) == tiles


def tile_masks(shape: tuple[int, int], rows: int, columns: int, rate: float, times: int) -> list[tuple[int, Tensor]]:
    pattern = Tile(shape)
    draws = drawn(pattern, pattern.tiles(rows, columns), rate, times)
    return [(draw.period, draw.mask(rows, columns, shape, torch.float64)) for draw in draws]


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (67, 50), (7, 100), (100, 9)])
def test_tiles_are_kept_whole_on_diagonals(rows: int, columns: int) -> None:
    """The last row and column of tiles, which are smaller, follow the same rule."""
    pattern, high, wide = Tile((8, 16)), -(-rows // 8), -(-columns // 16)
    for draw in drawn(pattern, pattern.tiles(rows, columns), 0.5, 50):
        mask = draw.mask(rows, columns, (8, 16), torch.float64)
        tiles = torch.zeros(high * 8, wide * 16, dtype=torch.float64)
        tiles[:rows, :columns] = mask
        for r in range(high):
            for c in range(wide):
                tile = mask[r * 8 : (r + 1) * 8, c * 16 : (c + 1) * 16]
                kept = (r + c - draw.bias) % draw.period == 0
                assert torch.equal(tile, torch.full_like(tile, draw.scale if kept else 0.0))
        assert draw.scale == pytest.approx(2.0)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (16, 96), (96, 16), (65, 17), (128, 8), (8, 128)])
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_every_draw_keeps_a_tile(rows: int, columns: int, rate: float) -> None:
    assert all(bool(mask.any()) for _, mask in tile_masks((8, 8), rows, columns, rate, 60))


@pytest.mark.parametrize("columns", [4, 6, 12])
@pytest.mark.parametrize("rate", [0.5, 0.7])
def test_no_column_or_row_of_tiles_is_dropped_whole(columns: int, rate: float) -> None:
    """Also where every period divides the number of columns: numbered r * columns + c, whole columns would go."""
    seen = set()
    for period, mask in tile_masks((8, 8), 8 * 12, 8 * columns, rate, 200):
        seen.add(period)
        assert mask.any(0).all()
        assert mask.any(1).all()
    assert len(seen) >= 3


def test_a_row_of_tiles_is_a_lattice_of_columns() -> None:
    for period, mask in tile_masks((8, 8), 8, 64, 0.5, 30):
        columns = mask[0, ::8] > 0
        assert columns.sum() in (8 // period, -(-8 // period))


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (50, 33)])
def test_tiles_are_unbiased(rows: int, columns: int) -> None:
    pattern = Tile((8, 8), max_period=4)
    fit = pattern.fit(pattern.tiles(rows, columns), 0.6)
    place = (torch.arange(rows) // 8)[:, None] + torch.arange(columns) // 8
    mean = torch.zeros(rows, columns, dtype=torch.float64)
    for period, chance in enumerate(fit.periods, 1):
        for bias in range(period):
            mean += chance / period * ((place - bias) % period == 0) * fit.scale
    assert torch.allclose(mean, torch.ones_like(mean), atol=1e-12)


def test_hashes_of_one_batch_are_separate_sites() -> None:
    """Sites of one shape are drawn together; each has its own numbers."""
    fit = Row().fit(64, 0.5)
    together = Row().choose(hashes(20), fit)
    alone = [Row().choose(row[None], fit)[0] for row in hashes(20)]
    assert all(a.starts.tolist() == b.starts.tolist() for a, b in zip(together, alone, strict=True))
