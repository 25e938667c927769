"""groups="auto": how many draws, as a rule, and what a model gets of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropfx
from dropfx.planning.draw_count import MOST, draw_count
from tests.catalogue.case import mlp


@pytest.mark.parametrize(
    ("rows", "leading", "rate", "draws"),
    [
        (1, 1, 0.5, 1),
        (88, 88, 0.5, 1),
        (89, 89, 0.5, 2),
        (128, 128, 0.5, 2),
        (128, 128, 0.1, 1),
        (128, 128, 0.7, 4),
        (700, 35, 0.3, 4),
        (700, 35, 0.5, 8),
        (700, 35, 0.7, MOST["auto"]),
        (700, 3, 0.5, 2),
        (10**6, 10**6, 0.9, MOST["auto"]),
        (0, 0, 0.5, 1),
    ],
)
def test_rule(rows: int, leading: int, rate: float, draws: int) -> None:
    assert draw_count(rows, leading, rate, "auto") == draws


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000, 5000])
def test_noise_of_a_draw_is_bounded(rows: int, rate: float) -> None:
    draws = draw_count(rows, rows, rate, "auto")
    assert draws == MOST["auto"] or rows / draws * rate / (1 - rate) <= 88
    faithful = draw_count(rows, rows, rate, "faithful")
    assert faithful >= draws
    assert faithful in (MOST["faithful"], rows) or rows / faithful * rate / (1 - rate) <= 22 or rows < 2 * faithful


def draws_of(model: nn.Module, *args: Tensor, **options: Any) -> list[int]:
    return [site.draws for site in dropfx.explain(model, *args, options={"min_speedup": 0, **options}).sites]


def test_rows_decide() -> None:
    net = mlp(64, 96, 96, 8)
    assert [draws_of(net, torch.randn(rows, 64)) for rows in (64, 128, 1024)] == [[1, 1], [2, 2], [8, 8]]


def test_positions_are_rows_where_each_has_a_mask() -> None:
    assert draws_of(mlp(64, 96, 8), torch.randn(8, 100, 64)) == [8]


def test_channels_have_a_mask_a_sample() -> None:
    net = nn.Sequential(nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(16 * 36, 24))
    assert draws_of(net, torch.randn(96, 16, 6, 6)) == [2]


def test_input_without_leading_axis_has_one_draw() -> None:
    assert draws_of(mlp(64, 128, 8), torch.randn(64)) == [1]


@pytest.mark.parametrize(("recipe", "draws"), [("fast", 1), ("faithful", 8), (None, 2)])
def test_recipes(recipe: str | None, draws: int) -> None:
    assert draws_of(mlp(64, 96, 8), torch.randn(128, 64), recipe=recipe) == [draws]


@pytest.mark.parametrize("front_end", ["compile", "eager"])
def test_each_chunk_of_rows_has_its_mask(front_end: str) -> None:
    torch.manual_seed(0)
    net, x = mlp(64, 96, 8), torch.randn(128, 64)
    if front_end == "compile":
        compiled = dropfx.compile(net, min_speedup=0)
    else:
        compiled = torch.compile(net, backend="dropfx", options={"min_speedup": 0, "inner": "eager"})
    with dropfx.testing.record() as records:
        compiled(x)
    (mask,) = records[0].values()
    assert mask.shape == (128, 96)
    assert [len(half.unique(dim=0)) for half in mask.chunk(2)] == [1, 1]
    assert not torch.equal(mask[0], mask[-1])


@pytest.mark.parametrize("pattern", ["block", "slice", "row"])
def test_exact_given_the_draws(pattern: str) -> None:
    options = {"min_speedup": 0, "pattern": pattern}
    dropfx.testing.assert_equivalent(mlp(64, 96, 96, 8).double(), torch.randn(200, 64).double(), options=options)


class Recurrent(nn.Module):
    """A layer of LSTM behind a dropout, and a Linear behind another."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.first, self.second = nn.Dropout(0.5), nn.Dropout(0.5)
        self.lstm, self.out = nn.LSTM(units, units, batch_first=True), nn.Linear(units, 64)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, steps, units] -> [batch, steps, 64]"""
        return self.out(self.second(self.lstm(self.first(x))[0]))


@pytest.mark.parametrize("min_speedup", [0, 1.05])
def test_batch_first_recurrence(min_speedup: float) -> None:
    """Exact; with one draw, and where its inputs are left alone, the layer stays PyTorch's fused one."""
    net, x = Recurrent(16).double(), torch.randn(6, 20, 16).double()
    dropfx.testing.assert_equivalent(net, x, options={"min_speedup": min_speedup})
