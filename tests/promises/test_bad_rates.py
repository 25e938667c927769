"""Rates outside of [0, 1] are an error at the call, as in PyTorch's dropout; the model works once they are mended."""

from __future__ import annotations

import pytest
import torch

import dropfx
from tests.catalogue import CASES
from tests.catalogue.case import recording
from tests.promises.untouched import example_mlp


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("traced", [False, True])
def test_rate_outside_of_its_range(p: float, traced: bool) -> None:
    """As PyTorch's dropout: an error at the call, in eval too; the model works again when the rate is mended."""
    model, x = dropfx.compile(example_mlp(), min_speedup=0), torch.randn(3, 64)
    if traced:
        model(x)
    model[2].p = p
    for training in (True, False):
        with pytest.raises((ValueError, RuntimeError), match=r"probability|rate"):
            model.train(training)(x)
    model.train()
    model[2].p = 0.5
    with recording() as masks:
        model(x)
    assert set(masks) == {"2", "5"}


@pytest.mark.parametrize("traced", [False, True])
def test_functional_rate_outside_of_its_range(traced: bool) -> None:
    model, x = dropfx.compile(CASES["functional"].make(), min_speedup=0), torch.randn(3, 64)
    if traced:
        model(x)
    model.p = 2.0
    with pytest.raises((ValueError, RuntimeError), match=r"probability|rate"):
        model(x)
