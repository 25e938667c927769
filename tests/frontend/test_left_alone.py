"""Calls for which nothing was rewritten run the forward itself, until something may have changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import dropfx
from dropfx.frontend import left_alone
from dropfx.frontend.capture import Capture
from tests.catalogue.case import mlp


class Calls:
    """How often captured graphs were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, own = 0, Capture.__call__

        def call(capture: Any, *args: Any) -> Any:
            self.count += 1
            return own(capture, *args)

        monkeypatch.setattr(Capture, "__call__", call)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def small() -> nn.Module:
    """Nothing of it pays."""
    return dropfx.compile(mlp(8, 16, 16, 8))


def test_the_graphs_are_asked_once(calls: Calls) -> None:
    model = small()
    for _ in range(10):
        model(torch.randn(4, 8)).sum().backward()
    assert calls.count == 1


def test_another_size_is_asked_anew(calls: Calls) -> None:
    model = small()
    for rows in (4, 4, 5, 5, 4):
        model(torch.randn(rows, 8))
    assert calls.count == 2


@pytest.mark.parametrize("change", ["rate", "off"])
def test_a_changed_dropout_is_asked_anew(calls: Calls, change: str) -> None:
    model = small()
    dropout = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    for step in range(4):
        if step == 2 and change == "rate":
            dropout.p = 0.25
        elif step == 2:
            dropout.eval()
        model(torch.randn(4, 8))
    assert calls.count == 2


def test_after_many_calls_they_are_asked_again(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_alone, "_CALLS", 5)
    model = small()
    for _ in range(13):
        model(torch.randn(4, 8))
    assert calls.count == 3


def test_kinds_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_alone, "_KINDS", 3)
    model = small()
    for rows in range(2, 12):
        model(torch.randn(rows, 8))
    assert len(model.__dict__["_dropfx"]._left_alone._calls) <= 3


def test_what_starts_to_pay_is_rewritten(calls: Calls) -> None:
    """A batch that is large enough; from then on the graphs answer all calls."""
    model = dropfx.compile(mlp(64, 512, 512, 8))
    with dropfx.testing.record() as masks:
        model(torch.randn(2, 64))
    assert not masks[0]
    model(torch.randn(2, 64))
    with dropfx.testing.record() as masks:
        model(torch.randn(2048, 64))
    assert masks[0]
    before = calls.count
    for _ in range(3):
        model(torch.randn(2048, 64))
    assert calls.count == before + 3


def test_it_draws_as_pytorch_does() -> None:
    original = mlp(8, 16, 16, 8).double()
    model = dropfx.compile(copy.deepcopy(original))
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(4, 8, dtype=torch.float64)
        torch.manual_seed(seed)
        expected = original(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(model(x), expected)


def test_disabled_is_heard(calls: Calls) -> None:
    model, x = small(), torch.randn(4, 8)
    model(x), model(x)
    with dropfx.disabled():
        torch.testing.assert_close(model(x), model(x))
    assert not torch.equal(model(x), model(x))


def test_inputs_in_containers_are_told_apart(calls: Calls) -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(8, 16, 16, 8)

        def forward(self, given: list[torch.Tensor], *, twice: bool = False) -> torch.Tensor:
            out = self.layers(given[0])
            return out + self.layers(given[0]) if twice else out

    model = dropfx.compile(Lists())
    for rows, twice in ((4, False), (4, False), (5, False), (4, True), (4, True), (5, False)):
        model([torch.randn(rows, 8)], twice=twice)
    assert calls.count == 3
