"""Promise 2 on random programs: whatever is next to a dropout, the result is exact given the draw."""

from __future__ import annotations

import contextlib

import pytest
import torch

import dropfx
from dropfx.patterns import Block, Slice
from tests.catalogue.case import check_step
from tests.catalogue.random_programs import make_program
from tests.oracle import oracle

PATTERNS = (Block(), Slice(), Block(5), Block(16))


def example(seed: int) -> torch.Tensor:
    return torch.randn(3, 4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def runs(seed: int) -> bool:
    """An in-place write may spoil what autograd needs; then PyTorch refuses the program itself."""
    with contextlib.suppress(RuntimeError):
        oracle.run(make_program(seed), (example(seed),))
        return True
    return False


def check_program(seed: int) -> None:
    if not runs(seed):
        pytest.skip("autograd refuses the original")
    compiled = dropfx.compile(make_program(seed), pattern=PATTERNS[seed % len(PATTERNS)], min_speedup=0)
    original = make_program(seed)
    for step in range(2):
        check_step(
            original,
            compiled,
            (example(seed + step),),
            dtype=torch.float64,
            seed=step,
            left_alone=tuple(site_names(original)),
            exact_zeros=False,  # a row may be zero by cancellation, as a softmax' of equal gradients
        )


def site_names(model: torch.nn.Module) -> list[str]:
    """Any site of a random program may be left alone."""
    with contextlib.ExitStack() as stack:
        names: list[str] = []
        stack.enter_context(oracle.replaced_dropout(model, {}, lambda name: not names.append(name)))
        model(example(0))
    return names


@pytest.mark.filterwarnings("ignore:.*no dropout")
@pytest.mark.parametrize("seed", range(80))
def test_random_program(seed: int) -> None:
    check_program(seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no dropout")
@pytest.mark.parametrize("seed", range(80, 1500))
def test_more_random_programs(seed: int) -> None:
    check_program(seed)
