"""Loops over nn.LSTMCell and its kin under both front ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dropfx
from tests.catalogue import CASES
from tests.catalogue.cells import ONE_MASK
from tests.frontend.steps import Call, captured, check, eager

BOTH = {"compile": eager, "backend": captured}


def step(call: Call, model: nn.Module, x: Tensor) -> Tensor:
    y, *_ = call(x)
    y.square().sum().backward()
    return y


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("front_end", BOTH)
@pytest.mark.parametrize("name", ["lstm_cell", "gru_cell", "rnn_cell_relu", *(f"one_mask_{one}" for one in ONE_MASK)])
def test_exact_given_the_draw(name: str, front_end: str, groups: int) -> None:
    original = CASES[name].make(torch.float64)
    x = torch.randn(6, 3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    compiled = BOTH[front_end](original, groups=groups)
    check(original, compiled, step, x, sites=set(CASES[name].rewritten))


@pytest.mark.parametrize("name", ["lstm_cell", "gru_cell", "one_mask_everywhere"])
def test_autocast(name: str) -> None:
    original = CASES[name].make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dropfx.testing.assert_equivalent(original, torch.randn(6, 3, 64), options={"min_speedup": 0})


@pytest.mark.parametrize("options", [{}, {"min_speedup": 1e9}], ids=["rewritten", "as written"])
@pytest.mark.parametrize("front_end", BOTH)
@pytest.mark.parametrize("name", ["one_mask_everywhere", "one_mask_lstm_by_dropout"])
def test_disabled(name: str, front_end: str, options: dict[str, float]) -> None:
    """One mask of all steps, off and on."""
    original, x = CASES[name].make(torch.float64), torch.randn(4, 3, 64, dtype=torch.float64)
    compiled = BOTH[front_end](original, **options)
    for _ in range(2):
        with dropfx.disabled():
            got = compiled(x)
        torch.testing.assert_close(got, original.eval()(x))
        assert not torch.equal(compiled(x)[0], compiled(x)[0])
