"""Training steps under both front ends, each against the oracle with the masks that its forwards recorded."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropfx
from tests.oracle import comparison, oracle

Call = Callable[..., Any]
Step = Callable[[Call, nn.Module, Tensor], Tensor]
"""step(call, model, x) runs forwards as call(x) and a backward; returns what is compared besides the gradients."""


def slow(*values: Any) -> Any:
    """Parameters of a test that is left to the slow ones: another like it is quick."""
    return pytest.param(*values, marks=pytest.mark.slow)


def eager(model: nn.Module, **options: Any) -> nn.Module:
    return dropfx.compile(copy.deepcopy(model), **{"min_speedup": 0, **options})


def captured(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(
        copy.deepcopy(model),
        backend="dropfx",
        options={"inner": "aot_eager", "min_speedup": 0, **options},
    )


def captured_eagerly(model: nn.Module, **options: Any) -> nn.Module:
    return captured(model, inner="eager", **options)


def compiled_on_top(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(eager(model, **options), backend="aot_eager")


FRONT_ENDS = {
    "compile": eager,
    "backend": captured,
    "backend_eager": captured_eagerly,
    "torch.compile of compile": compiled_on_top,
}


def check(
    original: nn.Module,
    compiled: nn.Module,
    step: Step,
    x: Tensor,
    *,
    sites: set[str],
    forwards: int = 1,
    dtype: torch.dtype = torch.float64,
) -> list[oracle.Masks]:
    """Promise 2 for a step of some forwards, each of which must draw at `sites`; the masks of the forwards."""
    with dropfx.testing.record() as recorded:
        actual = _outcome(compiled, step, x, compiled)
    frames = [masks for masks in recorded if masks]
    assert [set(masks) for masks in frames[:forwards]] == [sites] * forwards
    for again in frames[forwards:]:  # a checkpoint's second forward, which replays the draw
        assert any(same(again, masks) for masks in frames[:forwards])
    replay = iter(frames[:forwards])

    def masked(*args: Any, **kwargs: Any) -> Any:
        with oracle.replaced_dropout(original, next(replay)):
            return original(*args, **kwargs)

    with _plain_checkpoints():
        expected = _outcome(original, step, x, masked)
    assert next(replay, None) is None
    problems = list(comparison.differences(actual, expected, comparison.TOLERANCE[dtype]))
    for path, want in expected.items():
        problems += [f"{path}: {line}" for line in comparison.missing_zeros(actual[path], want) if path[0] == "d"]
    assert not problems, "\n".join(problems)
    return frames[:forwards]


def same(masks: oracle.Masks, others: oracle.Masks) -> bool:
    return masks.keys() == others.keys() and all(torch.equal(masks[name], others[name]) for name in masks)


def _outcome(model: nn.Module, step: Step, x: Tensor, call: Call) -> dict[str, Any]:
    x = x.clone().requires_grad_(x.is_floating_point())
    model.zero_grad(set_to_none=True)
    found: dict[str, Any] = {"result": step(call, model, x).detach(), "d input": x.grad}
    for name, parameter in model.named_parameters():
        found[f"d {name.removeprefix('_orig_mod.')}"] = parameter.grad
    for name, buffer in model.named_buffers():
        found[f"buffer {name.removeprefix('_orig_mod.')}"] = buffer.clone()
    return found


@contextlib.contextmanager
def _plain_checkpoints() -> Iterator[None]:
    plain = torch.utils.checkpoint.checkpoint
    torch.utils.checkpoint.checkpoint = oracle.plain_call
    try:
        yield
    finally:
        torch.utils.checkpoint.checkpoint = plain


def one_backward(call: Call, model: nn.Module, x: Tensor) -> Tensor:
    y = call(x)
    y.square().sum().backward()
    return y
