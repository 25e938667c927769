"""torch.lstm and its kin as one opaque op, for graphs whose compiler cannot take them: PyTorch 2.13 breaks on oneDNN's.

Only without dropout between the layers: backward computes forward again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import define, first_derivative_only


def _call(
    kind: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    grad_mode: bool,
) -> list[Tensor]:
    """The output, and the last states. PyTorch computes them in another way, and rounds otherwise, under no_grad."""
    hx: Any = states if kind == "lstm" else states[0]
    options = (weights, biases, layers, 0.0, False, bidirectional)
    function = getattr(torch, kind)
    args = (x, hx, *options, batch_first) if batch_sizes is None else (x, batch_sizes, hx, *options)
    with torch.set_grad_enabled(grad_mode):
        found = function(*args)
    out, *last = found
    # laid out as torch's own, by steps: what reads it would round otherwise
    out = out.transpose(0, 1).contiguous().transpose(0, 1) if batch_first else out.contiguous()
    return [out, *(part.contiguous() for part in last)]


def _fake(
    kind: str, x: Tensor, batch_sizes: Tensor | None, states: list[Tensor], weights: list[Tensor], *options: bool
) -> list[Tensor]:
    _, _, bidirectional, batch_first, _ = options
    width = states[0].size(-1) * (2 if bidirectional else 1)
    leading = x.shape[1::-1] if batch_first else x.shape[:-1]
    out = x.new_empty(*leading, width)
    return [out.transpose(0, 1) if batch_first else out, *(x.new_empty(state.shape) for state in states)]


def _backward(
    grads: list[Tensor],
    kind: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    grad_mode: bool,
) -> list[Tensor]:
    with _recording():
        leaves = [t.detach().requires_grad_() for t in (x, *states, *weights)]
        count = 1 + len(states)
        tensors, options = (leaves[0], batch_sizes, leaves[1:count], leaves[count:]), (biases, layers, bidirectional)
        made = _call(kind, *tensors, *options, batch_first, True)
        found = torch.autograd.grad(made, leaves, grads)
    return [grad.contiguous() for grad in found]


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd as it is outside of an op: inside of one its dispatch keys are shut out."""
    core: Any = torch._C
    shut_out = core._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        shut_out = shut_out.remove(getattr(core.DispatchKey, name))
    with core._ForceDispatchKeyGuard(core._dispatch_tls_local_include_set(), shut_out), torch.enable_grad():
        yield


def _backward_fake(grads: list[Tensor], kind: str, x: Tensor, batch_sizes: Tensor | None, *rest: Any) -> list[Tensor]:
    states, weights, *_ = rest
    return [t.new_empty(t.shape) for t in (x, *states, *weights)]


recurrent_as_written_op = define("recurrent_as_written", _call, _fake)
_backward_op = define("recurrent_as_written_backward", _backward, _backward_fake)
first_derivative_only(_backward_op, instead="the torch.nn module has one, outside of torch.compile")


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.kind, x, batch_sizes, states, weights, *ctx.options = inputs
    ctx.count = len(states)
    ctx.save_for_backward(x, batch_sizes, *states, *weights)


def _formula(ctx: Any, grads: list[Tensor]) -> Any:
    x, batch_sizes, *rest = ctx.saved_tensors
    states, weights = rest[: ctx.count], rest[ctx.count :]
    dx, *made = _backward_op(grads, ctx.kind, x, batch_sizes, states, weights, *ctx.options)
    return None, dx, None, made[: ctx.count], made[ctx.count :], *[None] * 5


torch.library.register_autograd(recurrent_as_written_op, _formula, setup_context=_save)
