"""`block`: the size chosen for an axis, what is refused, and which blocks a draw keeps."""

import pytest
import torch

from dropfx.draws.draw_plan import DrawPlan
from dropfx.errors import InvalidOption
from dropfx.patterns import Block, Draw, PatternRefused
from tests.draws.statistics_of_draws import assert_binomial

UNITS = [32, 62, 64, 96, 100, 250, 768, 1000, 4096, 10240]
RATES = [0.05, 0.1, 0.25, 0.5, 0.7, 0.95]
EXPLICIT = [(64, 16), (96, 1), (100, 16), (67, 5), (64, 33), (10, 3)]
"""Units and block size; the last four leave a shorter block at the end."""


def drawn(pattern: Block, units: int, rate: float, times: int, seed: int = 0) -> list[Draw]:
    """Draws of one site from `times` numbers."""
    plan = DrawPlan(["site"], [pattern.fit(units, rate)], pattern, torch.device("cpu"))
    numbers = torch.empty(times, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed))
    return [plan.draw(number)[0] for number in numbers]


# -- fitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("units", UNITS)
def test_auto_block_divides_the_axis_and_meets_the_rate(units: int, rate: float) -> None:
    fit = Block().fit(units, rate)
    assert units % fit.run == 0
    assert not fit.ragged
    assert units // fit.run >= 32
    assert abs(fit.drawn_rate - rate) <= 0.02


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("units", UNITS)
def test_auto_block_is_the_largest_that_will_do(units: int, rate: float) -> None:
    def error(size: int) -> float:
        blocks = units // size
        return min(abs(kept / blocks - (1 - rate)) for kept in range(1, blocks))

    fitting = [size for size in range(1, 129) if units % size == 0 and units // size >= 32 and error(size) <= 0.02]
    assert Block().fit(units, rate).run == max(fitting)


def test_auto_block_is_no_longer_than_copies_gain_from() -> None:
    assert Block().fit(2**20, 0.5).run == 128


def test_auto_block_of_a_prime_axis_is_one_unit() -> None:
    assert Block().fit(997, 0.5).run == 1


@pytest.mark.parametrize("units", [2, 10, 31])
def test_axis_too_short_for_32_blocks_has_blocks_of_one_unit(units: int) -> None:
    assert Block().fit(units, 0.5).run == 1


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("units", "size"), EXPLICIT)
def test_explicit_block_keeps_the_count_nearest_to_the_rate(units: int, size: int, rate: float) -> None:
    fit = Block(size).fit(units, rate)
    blocks = -(-units // size)
    nearest = min(abs(1 - kept / blocks - rate) for kept in range(1, blocks))
    assert fit.run == size
    assert fit.drawn_rate == pytest.approx(1 - fit.count / blocks, abs=1e-12)
    assert abs(fit.drawn_rate - rate) == pytest.approx(nearest, abs=1e-12)


@pytest.mark.parametrize(("units", "size"), EXPLICIT)
def test_explicit_block_is_ragged_where_it_does_not_divide_the_axis(units: int, size: int) -> None:
    assert Block(size).fit(units, 0.5).ragged == (units % size != 0)


def test_explicit_block_may_miss_the_rate() -> None:
    """The user chose the size: the drawn rate is reported, not refused."""
    assert Block(32).fit(64, 0.3).drawn_rate == 0.5


@pytest.mark.parametrize("rate", [1e-9, 0.001, 0.999, 1 - 1e-9])
@pytest.mark.parametrize(("units", "size"), EXPLICIT)
def test_extreme_rates_keep_one_block_and_drop_one(units: int, size: int, rate: float) -> None:
    fit = Block(size).fit(units, rate)
    assert fit.count == (1 if rate > 0.5 else -(-units // size) - 1)
    assert 0 < fit.drawn_rate < 1


@pytest.mark.parametrize(("units", "size"), [(64, "auto"), (100, 16)])
def test_scale_makes_up_for_the_drawn_rate(units: int, size: int | str) -> None:
    fit = Block(size).fit(units, 0.3)
    assert fit.scale * (1 - fit.drawn_rate) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("units", "size"), [(64, "auto"), (100, 16)])
def test_width_counts_the_padding(units: int, size: int | str) -> None:
    fit = Block(size).fit(units, 0.3)
    assert fit.width == fit.run * fit.count


def test_axis_of_one_unit_is_refused() -> None:
    with pytest.raises(PatternRefused, match=r"an axis of 1 unit\(s\) is too short"):
        Block().fit(1, 0.5)


def test_refusal_names_the_rate_that_the_axis_could_meet() -> None:
    with pytest.raises(PatternRefused, match=r"of 3 units the nearest rate to 0\.5 is 0\.333, more than 0\.02 away"):
        Block().fit(3, 0.5)


@pytest.mark.parametrize("size", [64, 65])
def test_block_as_long_as_the_axis_is_refused(size: int) -> None:
    with pytest.raises(PatternRefused, match=f"block size {size} leaves fewer than two blocks on an axis of 64 units"):
        Block(size).fit(64, 0.5)


@pytest.mark.parametrize("size", [0, -4, True, 2.0, "large", None])
def test_sizes_that_are_no_size_are_refused(size: object) -> None:
    with pytest.raises(InvalidOption, match=r"block: got .*, accepted are 'auto' and integers >= 1"):
        Block(size)  # type: ignore[arg-type]


# -- drawing --------------------------------------------------------------------------------------------------------

DRAWN = [(64, "auto", 0.5), (96, 1, 0.3), (64, 16, 0.01), (100, 16, 0.7), (67, 5, 0.99), (64, 33, 0.5)]
each = pytest.mark.parametrize(("units", "size", "rate"), DRAWN)


@each
def test_starts_are_distinct_blocks_in_ascending_order(units: int, size: int | str, rate: float) -> None:
    for draw in drawn(Block(size), units, rate, 50):
        assert draw.starts.dtype == torch.int64
        assert draw.starts.shape == (draw.fit.count,)
        assert (draw.starts.diff() > 0).all()
        assert (draw.starts % draw.run == 0).all()
        assert draw.starts[0] >= 0
        assert draw.starts[-1] < units


@each
def test_width_is_the_same_in_every_draw(units: int, size: int | str, rate: float) -> None:
    fit = Block(size).fit(units, rate)
    for draw in drawn(Block(size), units, rate, 20):
        assert draw.width == fit.width == draw.units().numel() == draw.run * draw.starts.numel()


@each
def test_mask_holds_the_scale_at_whole_kept_blocks(units: int, size: int | str, rate: float) -> None:
    for draw in drawn(Block(size), units, rate, 20):
        expected = torch.zeros(units, dtype=torch.float64)
        for start in draw.starts.tolist():
            expected[start : start + draw.run] = draw.fit.scale
        torch.testing.assert_close(draw.mask(torch.float64), expected, rtol=0, atol=1e-12)


def test_mask_has_the_dtype_asked_for() -> None:
    (draw,) = drawn(Block(16), 100, 0.5, 1)
    assert draw.mask(torch.bfloat16).dtype == torch.bfloat16


def test_scale_is_a_number_where_blocks_divide_the_axis() -> None:
    (draw,) = drawn(Block(16), 64, 0.5, 1)
    assert draw.scale == 2.0


def test_scale_of_a_ragged_draw_is_zero_at_the_padding_alone() -> None:
    """The last of seven blocks of 16 has four units; where it is kept, twelve positions are padding."""
    seen = set()
    for draw in drawn(Block(16), 100, 0.5, 50):
        padding = 12 if draw.starts[-1] == 96 else 0
        assert isinstance(draw.scale, torch.Tensor)
        assert draw.scale.shape == (draw.width,)
        assert (draw.scale[: draw.width - padding] == draw.fit.scale).all()
        assert (draw.scale[draw.width - padding :] == 0).all()
        seen.add(padding)
    assert seen == {0, 12}


def test_units_of_padding_lie_on_the_axis() -> None:
    """Reading them must be possible; their scale is 0."""
    for draw in drawn(Block(33), 64, 0.5, 20):
        assert draw.units().min() >= 0
        assert draw.units().max() < 64


def test_kept_units_sum_to_the_axis_when_scaled() -> None:
    """Where blocks divide the axis, each draw by itself has mean 1."""
    for draw in drawn(Block(), 96, 0.3, 20):
        assert draw.mask(torch.float64).sum().item() == pytest.approx(96, abs=1e-9)


@pytest.mark.parametrize(("units", "size", "rate"), [(64, "auto", 0.3), (24, 1, 0.9), (100, 16, 0.5), (67, 5, 0.2)])
def test_every_unit_is_kept_equally_often(units: int, size: int | str, rate: float) -> None:
    """Units of a shorter last block included."""
    draws = drawn(Block(size), units, rate, 3000)
    kept = torch.stack([draw.mask(torch.float32) != 0 for draw in draws]).sum(0)
    assert_binomial(kept.tolist(), 3000, 1 - draws[0].fit.drawn_rate)


def test_every_pair_of_blocks_is_kept_equally_often() -> None:
    """Without replacement: k(k-1) / n(n-1) for two of n blocks."""
    kept = torch.stack([draw.mask(torch.float64)[::8] != 0 for draw in drawn(Block(8), 64, 0.5, 3000)]).double()
    together = (kept.T @ kept)[tuple(torch.triu_indices(8, 8, offset=1))]
    assert_binomial(together.long().tolist(), 3000, 4 * 3 / (8 * 7))
