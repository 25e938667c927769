"""`rows`: how many samples a draw keeps, and which."""

import pytest
import torch

from dropfx.draws.draw_plan import DrawPlan
from dropfx.patterns import RowDraw, Rows
from tests.draws.statistics_of_draws import assert_binomial, assert_uniform

PLACES = [(8, 0.3), (10, 0.5), (4, 0.1), (2, 0.8), (1, 0.3), (7, 0.45)]


def drawn(batch: int, rate: float, times: int) -> list[RowDraw]:
    plan = DrawPlan(["site"], [Rows().fit(batch, rate)], Rows(), torch.device("cpu"))
    numbers = torch.empty(times, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(0))
    return [plan.draw(number)[0] for number in numbers]


@pytest.mark.parametrize(("batch", "rate"), PLACES)
def test_each_row_is_dropped_with_exactly_the_rate(batch: int, rate: float) -> None:
    masks = torch.stack([draw.mask(torch.float64) for draw in drawn(batch, rate, 4000)])
    assert_binomial((masks == 0).sum(0).tolist(), 4000, rate)


@pytest.mark.parametrize(("batch", "rate"), PLACES)
def test_the_count_is_floor_or_ceil_and_one_row_runs_at_least(batch: int, rate: float) -> None:
    places = batch * (1 - rate)
    kept = [int(draw.mask(torch.float64).sum()) for draw in drawn(batch, rate, 500)]
    assert set(kept) <= {int(places + 1e-9), -int(-places // 1)}
    for draw, count in zip(drawn(batch, rate, 500), kept, strict=True):
        assert len(draw.rows) == max(count, 1)
        assert draw.rows.tolist() == sorted(set(draw.rows.tolist()))
        assert draw.scale == (count > 0)


def test_subsets_of_one_size_are_equally_likely() -> None:
    subsets = [tuple(draw.rows.tolist()) for draw in drawn(4, 0.5, 3000)]
    numbers = {subset: number for number, subset in enumerate(sorted(set(subsets)))}
    assert len(numbers) == 6
    assert_uniform([numbers[subset] for subset in subsets], 6)


def test_two_rows_are_correlated_as_without_replacement() -> None:
    masks = torch.stack([draw.mask(torch.float64) for draw in drawn(8, 0.25, 6000)])
    pairs = torch.corrcoef(masks.t())[~torch.eye(8, dtype=torch.bool)]
    assert pairs.mean().item() == pytest.approx(-1 / 7, abs=1e-3)  # k is the same in each draw
    assert (pairs + 1 / 7).abs().max() < 0.07
