"""The comparison of two outcomes: a stated tolerance per dtype, and exact zeros at dropped places."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.oracle.oracle import Outcome

# Allowed |actual - expected|, as a share of the largest expected value of the same tensor.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# A tensor that is small beside its kind (a key bias' gradient is zero but for rounding) is measured against this share
# of the largest value of the kind.
SMALL = 1e-3


def compare(actual: Outcome, expected: Outcome, dtype: torch.dtype, exact_zeros: bool = True) -> None:
    """Assert that two outcomes agree to `TOLERANCE[dtype]`, and that gradients are exactly zero at dropped places."""
    problems: list[str] = []
    for field in dataclasses.fields(Outcome):
        got, want = getattr(actual, field.name), getattr(expected, field.name)
        problems += [f"{field.name}{line}" for line in differences(got, want, TOLERANCE[dtype])]
    for path, want in expected.grads.items() if exact_zeros else ():
        problems += [f"grads {path}: {line}" for line in missing_zeros(actual.grads.get(path), want)]
    assert not problems, "\n".join(problems)


def differences(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> Iterator[str]:
    """One line for each leaf that differs."""
    if list(actual) != list(expected):
        yield f": {list(actual)} instead of {list(expected)}"
        return
    overall = max((largest(value) for value in expected.values()), default=0.0)
    for path, want in expected.items():
        line = difference(actual[path], want, tolerance, floor=SMALL * overall)
        if line:
            yield f" {path}: {line}"


def difference(actual: Any, expected: Any, tolerance: float, floor: float) -> str:
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        same = actual is expected or (type(actual) is type(expected) and actual == expected)
        return "" if same else f"{actual!r} instead of {expected!r}"
    for what in ("shape", "dtype", "layout"):
        if getattr(actual, what) != getattr(expected, what):
            return f"{what} {getattr(actual, what)} instead of {getattr(expected, what)}"
    actual, expected = dense(actual), dense(expected)
    if not expected.is_floating_point():
        return "" if torch.equal(actual, expected) else "differs"
    if not torch.isfinite(actual).all():
        return "is not finite"
    error = largest(actual.double() - expected.double())
    scale = max(largest(expected), floor)
    return "" if error <= tolerance * scale else f"error {error:.3g} at scale {scale:.3g}, allowed {tolerance:g} of it"


def missing_zeros(actual: Tensor | None, expected: Tensor | None) -> Iterator[str]:
    """Where a whole row or column of the expected gradient is exactly zero (a dropped unit), so must it be here.

    Vectors are left out: one gradient of a bias may be zero by cancellation.
    """
    if actual is None or expected is None or actual.shape != expected.shape or expected.dim() < 2:
        return
    actual, expected = dense(actual), dense(expected)
    for axis in range(expected.dim()):
        dropped = (expected == 0).all([other for other in range(expected.dim()) if other != axis])
        wrong = int(actual.index_select(axis, dropped.nonzero().flatten()).count_nonzero())
        if wrong:
            yield f"{wrong} values at dropped places of axis {axis} are not exactly zero"


def dense(value: Tensor) -> Tensor:
    return value.to_dense() if value.layout != torch.strided else value


def largest(value: Any) -> float:
    """The largest absolute value; 0 for what is no floating tensor or has no elements."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return 0.0
    return float(dense(value).detach().double().abs().max())
