"""`slice`: the window fitted to an axis, what is refused, and where a draw begins."""

import pytest
import torch

from dropfx.draws.draw_plan import DrawPlan
from dropfx.patterns import Draw, PatternRefused, Slice
from tests.draws.statistics_of_draws import assert_binomial, assert_uniform

RATES = [0.05, 0.3, 0.5, 0.7, 0.95]


def drawn(units: int, rate: float, times: int, seed: int = 0) -> list[Draw]:
    """Draws of one site from `times` numbers."""
    plan = DrawPlan(["site"], [Slice().fit(units, rate)], Slice(), torch.device("cpu"))
    numbers = torch.empty(times, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed))
    return [plan.draw(number)[0] for number in numbers]


# -- fitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("units", [20, 64, 67, 100, 1000])
def test_window_is_the_nearest_to_the_rate(units: int, rate: float) -> None:
    fit = Slice().fit(units, rate)
    nearest = min(abs(1 - kept / units - rate) for kept in range(1, units))
    assert fit.count == 1
    assert fit.width == fit.run
    assert fit.drawn_rate == pytest.approx(1 - fit.run / units, abs=1e-12)
    assert abs(fit.drawn_rate - rate) == pytest.approx(nearest, abs=1e-12)
    assert nearest <= 0.02 or units == 20


def test_window_is_never_ragged() -> None:
    """It wraps around the end of the axis instead."""
    assert not Slice().fit(67, 0.3).ragged


@pytest.mark.parametrize(("rate", "kept"), [(1e-9, 127), (0.001, 127), (0.999, 1), (1 - 1e-9, 1)])
def test_extreme_rates_keep_one_unit_and_drop_one(rate: float, kept: int) -> None:
    assert Slice().fit(128, rate).run == kept


def test_scale_makes_up_for_the_drawn_rate() -> None:
    fit = Slice().fit(67, 0.3)
    assert fit.scale * (1 - fit.drawn_rate) == pytest.approx(1.0, abs=1e-12)


def test_axis_of_one_unit_is_refused() -> None:
    with pytest.raises(PatternRefused, match=r"an axis of 1 unit\(s\) is too short"):
        Slice().fit(1, 0.5)


@pytest.mark.parametrize(("units", "rate"), [(3, 0.5), (2, 0.3), (10, 0.25), (5, 0.01)])
def test_axis_too_narrow_for_the_rate_is_refused(units: int, rate: float) -> None:
    with pytest.raises(PatternRefused, match=f"no window over {units} units meets rate {rate} to within 0.02"):
        Slice().fit(units, rate)


def test_narrow_axis_that_fits_is_served() -> None:
    assert Slice().fit(2, 0.5).run == 1


# -- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("units", [64, 67])
def test_start_is_one_unit_of_the_axis(units: int, rate: float) -> None:
    for draw in drawn(units, rate, 50):
        assert draw.starts.dtype == torch.int64
        assert draw.starts.shape == (1,)
        assert 0 <= draw.starts.item() < units


@pytest.mark.parametrize("rate", RATES)
def test_units_follow_each_other_around_the_end_of_the_axis(rate: float) -> None:
    for draw in drawn(67, rate, 50):
        start = int(draw.starts)
        assert draw.units().tolist() == [(start + i) % 67 for i in range(draw.width)]


@pytest.mark.parametrize("rate", RATES)
def test_mask_holds_the_scale_at_the_window(rate: float) -> None:
    for draw in drawn(67, rate, 20):
        mask = draw.mask(torch.float64)
        assert set(mask.nonzero().flatten().tolist()) == set(draw.units().tolist())
        torch.testing.assert_close(mask[draw.units()], torch.full((draw.width,), draw.fit.scale).double())
        assert mask.sum().item() == pytest.approx(67, abs=1e-6)


def test_scale_is_a_number() -> None:
    (draw,) = drawn(64, 0.5, 1)
    assert draw.scale == 2.0


@pytest.mark.parametrize(("units", "rate"), [(64, 0.5), (67, 0.2), (20, 0.95)])
def test_every_unit_is_kept_equally_often(units: int, rate: float) -> None:
    draws = drawn(units, rate, 3000)
    kept = torch.stack([draw.mask(torch.float32) != 0 for draw in draws]).sum(0)
    assert_binomial(kept.tolist(), 3000, 1 - draws[0].fit.drawn_rate)


@pytest.mark.parametrize("units", [16, 67])
def test_every_start_is_equally_likely(units: int) -> None:
    assert_uniform([int(draw.starts) for draw in drawn(units, 0.5, 3000)], units)
