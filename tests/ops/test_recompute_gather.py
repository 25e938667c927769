"""Kept weights that backward gathers again: what is saved, and the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

import dropfx
from dropfx.bench import harness
from dropfx.bench.lstm import Case
from dropfx.bench.steps import Workload
from dropfx.ops import EAGER, gather_op, gathered_weight, linear_op, recompute_gather

STEPS, BATCH, INPUTS, UNITS = 3, 2, 12, 4
STARTS, RUN = torch.tensor([0, 8]), 4
WORDS = 8000
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}


class Layer:
    """A layer of torch's on 8 of 12 columns of W_ih."""

    def __init__(self, kind: str = "lstm") -> None:
        torch.manual_seed(0)
        self.kind = kind
        rows = GATES[kind] * UNITS
        shapes = [(rows, INPUTS), (rows, UNITS), (rows,), (rows,)]
        self.x = torch.randn(STEPS, BATCH, 8, requires_grad=True)
        self.weights = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def __call__(self, again: bool = True) -> Tensor:
        whole, *others = self.weights
        kept = EAGER[gather_op](whole, STARTS, RUN, 1)
        self.kept = StorageWeakRef(kept.untyped_storage())
        state = torch.zeros(1, BATCH, UNITS)
        hx = (state, state) if self.kind == "lstm" else state
        args = self.x, hx, [kept, *others], True, 1, 0.0, True, False, False
        if again:
            return recompute_gather(self.kind, kept, whole, STARTS, RUN, 1, *args)[0]
        made: tuple[Tensor, ...] = getattr(torch, self.kind)(*args)
        return made[0]


def test_the_copy_does_not_wait() -> None:
    layer = Layer()
    out = layer(again=True)
    assert layer.kept.expired()
    out = layer(again=False)
    assert not layer.kept.expired()
    assert out.requires_grad


@pytest.mark.parametrize("kind", GATES)
def test_gradients_are_those_of_the_held_copy(kind: str) -> None:
    layer = Layer(kind)
    leaves = [layer.x, *layer.weights]
    found = torch.autograd.grad(layer(again=True).square().sum(), leaves)
    expected = torch.autograd.grad(layer(again=False).square().sum(), leaves)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_second_derivative() -> None:
    layer = Layer()
    seconds = []
    for again in (True, False):
        (slope,) = torch.autograd.grad(layer(again).square().sum(), layer.x, create_graph=True)
        seconds.append(torch.autograd.grad(slope.square().sum(), [layer.x, *layer.weights[:2]]))
    torch.testing.assert_close(*seconds)


def test_a_weight_changed_in_between_is_an_error() -> None:
    layer = Layer()
    out = layer()
    with torch.no_grad():
        layer.weights[0] += 1
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: a weight of shape \[16, 12\]"):
        out.sum().backward()


def test_hooks_of_others_see_all_that_is_saved() -> None:
    """A checkpoint and save_on_cpu decide about every saved tensor."""
    layer = Layer()
    seen: list[torch.Size] = []
    with saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        layer()
    assert (16, 8) in seen


def test_where_hooks_are_forbidden() -> None:
    layer = Layer()
    with disable_saved_tensors_hooks("not here"):
        layer().sum().backward()
    assert layer.x.grad is not None


@pytest.mark.parametrize("threshold", [0, 10**9])
def test_linear(threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(gathered_weight, "_GATHER_AGAIN", threshold)
    x, weight, bias = torch.randn(6, 8), torch.randn(40, 12), torch.randn(40)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = EAGER[linear_op](*leaves, None, 0, STARTS, RUN, 2.0)
    assert (out.grad_fn.held is None) is (threshold == 0)
    kept = (STARTS[:, None] + torch.arange(RUN)).view(-1)
    expected = 2.0 * (x @ weight[:, kept].t()) + bias
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, cotangent)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, cotangent))


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_a_language_model_takes_less_memory_than_dense(rate: float) -> None:
    """With words enough for a copy of the decoder's kept weight to be more than what masks took."""
    work = Case(units=64, vocabulary=WORDS, batch=20, rate=rate).workload()
    dense = peak(work, work.model)
    assert peak(work, dropfx.compile(work.model, min_speedup=0)) < dense


@pytest.mark.slow
def test_under_inductor_too() -> None:
    work = Case(units=64, vocabulary=WORDS, batch=20, rate=0.3).workload()
    dense = peak(work, work.model)
    options = {"min_speedup": 0}
    assert peak(work, torch.compile(work.model, backend="dropfx", options=options)) < dense


def peak(work: Workload, runnable: Any) -> int:
    """Bytes of a step above the resting level."""
    step = work.make_step(runnable, work.model)
    step(), step()
    work.model.zero_grad(set_to_none=True)
    return harness.peak_memory(step)
