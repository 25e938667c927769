"""Promise 1: eval is untouched, bit for bit."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import nn

import dropfx
from dropfx.draws.runtime import shared
from tests.catalogue import CASES
from tests.catalogue.case import Case, pair, recording
from tests.catalogue.test_equivalence import every
from tests.oracle import comparison, oracle

LAYERED = [name for name in CASES if not name.startswith(("before_", "after_"))]


def assert_identical(actual: oracle.Outcome, expected: oracle.Outcome) -> None:
    for field in dataclasses.fields(oracle.Outcome):
        problems = list(comparison.differences(getattr(actual, field.name), getattr(expected, field.name), 0.0))
        assert not problems, f"{field.name}: {problems}"


def seeded_run(model: nn.Module, case: Case, seed: int = 0) -> tuple[oracle.Outcome, torch.Tensor, object]:
    args, kwargs = case.call(4)
    oracle.set_seed(seed)
    outcome = oracle.run(model, args, kwargs, input_grad=case.input_grad)
    return outcome, torch.get_rng_state(), random.getstate()


def check_eval(original: nn.Module, compiled: nn.Module, case: Case) -> None:
    with dropfx.testing.record() as masks:
        actual, generator, python_generator = seeded_run(compiled.eval(), case)
    expected, same_generator, same_python_generator = seeded_run(original.eval(), case)
    assert_identical(actual, expected)
    assert not any(masks), "an eval call recorded a mask"
    assert torch.equal(generator, same_generator)
    assert python_generator == same_python_generator
    assert case.state(compiled) == case.state(original)


@pytest.mark.filterwarnings("ignore:.*no dropout")
@pytest.mark.parametrize("name", every(LAYERED, 2))
def test_eval_before_any_training(name: str) -> None:
    case = CASES[name]
    check_eval(*pair(case), case)


@pytest.mark.filterwarnings("ignore:.*no dropout")
@pytest.mark.parametrize("name", every(LAYERED, 8))
def test_eval_after_training(name: str) -> None:
    case = CASES[name]
    original, compiled = pair(case)
    args, kwargs = case.call(4)
    for model in (original, compiled):
        oracle.set_seed(0)
        oracle.run(model, args, kwargs, input_grad=case.input_grad)
    compiled.load_state_dict(original.state_dict())  # batch statistics of another draw
    check_eval(original, compiled, case)


def test_eval_without_gradients() -> None:
    case = CASES["pre_norm_blocks"]
    original, compiled = pair(case)
    with torch.no_grad():
        check_eval(original, compiled, case)
    with torch.inference_mode():
        check_eval(original, compiled, case)


def test_eval_under_autocast() -> None:
    case = CASES["pre_norm_blocks"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_eval(*pair(case), case)


def test_eval_does_not_trace() -> None:
    _, compiled = pair(CASES["mlp"])
    before = shared.rewritten
    compiled.eval()(torch.randn(3, 64))
    assert shared.rewritten == before


def test_eval_and_train_interleaved() -> None:
    case = CASES["mlp"]
    original, compiled = pair(case)
    args, _ = case.call(4)
    for _ in range(3):
        with recording() as masks:
            compiled.train()(*args)
        assert set(masks) == {"2", "5"}
        check_eval(original, compiled, case)
