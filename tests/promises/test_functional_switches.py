"""Promise 5 for functional dropouts, whose rates and switches are read from attributes, and for plain attributes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropfx
from dropfx.draws.runtime import shared
from tests.oracle import oracle
from tests.promises.switching import check, dropped_share


class Scheduled(nn.Module):
    """`F.dropout` with rates that are read from attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.lin2, self.lin3 = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 8)
        self.p, self.rates, self.factor, self.residual, self.live = 0.5, {"hidden": 0.25}, 1.0, False, True

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.tanh(self.lin1(x)), self.p, self.training)
        hidden = self.rates["hidden"] * self.factor
        z = F.dropout(torch.tanh(self.lin2(h)), p=hidden, training=self.training and self.live)
        return self.lin3(h + z if self.residual else z)


@pytest.fixture
def scheduled() -> tuple[nn.Module, nn.Module]:
    original, compiled = Scheduled().double(), Scheduled().double()
    compiled.load_state_dict(original.state_dict())
    models = original, dropfx.compile(compiled, min_speedup=0)
    assert set(check(models)) == {":dropout_1", ":dropout_2"}
    return models


def shares(masks: oracle.Masks) -> list[float]:
    return [round(dropped_share(masks[name]), 6) for name in (":dropout_1", ":dropout_2")]


def test_functional_rate(scheduled: tuple[nn.Module, nn.Module]) -> None:
    for p in (0.25, 0.75, 0.5):
        for model in scheduled:
            model.p = p
        assert shares(check(scheduled)) == [p, 0.25]


def test_functional_rate_schedule_does_not_retrace(scheduled: tuple[nn.Module, nn.Module]) -> None:
    traces = shared.rewritten
    for step in range(10):
        for model in scheduled:
            model.p = 0.1 + 0.05 * step
        check(scheduled, step)
    assert shared.rewritten <= traces + 1  # from the first change on it is an input


def test_functional_rate_computed(scheduled: tuple[nn.Module, nn.Module]) -> None:
    for model in scheduled:
        model.factor = 2.0
    assert shares(check(scheduled)) == [0.5, 0.5]


def test_functional_rate_in_a_container(scheduled: tuple[nn.Module, nn.Module]) -> None:
    for model in scheduled:
        model.rates["hidden"] = 0.75
    assert shares(check(scheduled)) == [0.5, 0.75]


def test_functional_switch(scheduled: tuple[nn.Module, nn.Module]) -> None:
    for training in (False, True):
        for model in scheduled:
            model.train(training)
        assert len(check(scheduled)) == 2 * training
    for model in scheduled:
        model.live = False
    assert set(check(scheduled)) == {":dropout_1"}


def test_functional_rates_of_zero_and_one(scheduled: tuple[nn.Module, nn.Module]) -> None:
    for p in (0.0, 1.0, 0.5):
        for model in scheduled:
            model.p = p
        masks = check(scheduled)
    assert shares(masks) == [0.5, 0.25]


def test_plain_attribute(scheduled: tuple[nn.Module, nn.Module]) -> None:
    for residual in (True, False, True):
        for model in scheduled:
            model.residual = residual
        check(scheduled)
