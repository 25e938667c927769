"""y = scale * x' @ W[rows][:, cols]^T + b[rows]

x' is compact where `cols` is given, y where `rows` is: forward, input gradient, weight gradient and bias gradient all
multiply kept units only. The weight's gradient arrives dense with exact zeros at the dropped places.

Shapes: x [*, K'], W [N, K], b [N], y [*, N'];  M = product of the leading dimensions
    dX [M, K'] = scale * dY [M, N'] @ W[rows][:, cols] [N', K']
    dW [N, K]  = scatter(scale * dY^T [N', M] @ X [M, K'])
    db [N]     = scatter(sum over M of dY)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import autocast, by, define, differentiable, eager, first_derivative_only, padded, whole
from dropfx.ops.gathered_weight import worth_gathering_again
from dropfx.ops.kept import Kept, save_kept, saved_kept
from dropfx.ops.parts import Parts
from dropfx.ops.runs import stored_transposed


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Kept | None, cols: Kept | None, scale: float
) -> Tensor:
    parts = _parts(x, weight, rows, cols)
    return _product(parts, x, bias, parts.gather(weight), scale)


def _parts(x: Tensor, weight: Tensor, rows: Kept | None, cols: Kept | None) -> Parts:
    return Parts(math.prod(x.shape[:-1]), weight, rows, cols)


def _product(parts: Parts, x: Tensor, bias: Tensor | None, gathered: Iterable[Tensor], scale: float) -> Tensor:
    out = parts.product(_flat(x), bias, gathered, scale)
    return whole(out.view(*x.shape[:-1], out.size(1)))


def _input_gradient(parts: Parts, grad: Tensor, gathered: Iterable[Tensor], scale: float) -> Tensor:
    dx = parts.input_gradient(_flat(grad), gathered, scale)
    return dx.view(*grad.shape[:-1], dx.size(1))


def _weight_gradient(parts: Parts, grad: Tensor, x: Tensor, scale: float) -> Tensor:
    return parts.weight_gradient(_flat(grad), _flat(x).to(grad.dtype), scale)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1))


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Kept | None, *_: Any) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.size(0) if rows is None else rows.width])


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Kept | None,
    cols: Kept | None,
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    parts = _parts(x, weight, rows, cols)
    dx = _input_gradient(parts, grad, parts.gather(weight), scale) if mask[0] else None
    dw = _weight_gradient(parts, grad, x, scale) if mask[1] else None
    db = parts.bias_gradient(_flat(grad)) if mask[2] else None
    return (
        x.new_empty(0) if dx is None else dx.to(x.dtype),
        weight.new_empty(0) if dw is None else dw,
        weight.new_empty(0) if db is None else db,
    )


def _linear_backward_fake(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    mask: list[bool] = rest[-1]
    return (
        x.new_empty(x.shape if mask[0] else 0),
        _like(weight) if mask[1] else weight.new_empty(0),
        weight.new_empty(weight.size(0) if mask[2] else 0),
    )


def _like(weight: Tensor) -> Tensor:
    return torch.empty_like(weight.t()).t() if stored_transposed(weight) else weight.new_empty(weight.shape)


linear_op = define("linear", _linear, _linear_fake)
linear_backward_op = define("linear_backward", _linear_backward, _linear_backward_fake)
first_derivative_only(linear_backward_op)


def save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """What `formula` reads, of x, W, b, rows, cols and scale."""
    x, weight, _, rows, cols, ctx.scale, *_ = inputs
    ctx.mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    save_kept(ctx, rows, cols, tensors=(x, weight))


def formula(backward_op: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    """The derivative by a registered op."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dx, dW and db as far as they are asked for."""
        axes, (x, weight) = saved_kept(ctx)
        grads = by(backward_op)(grad, x, weight, *axes, ctx.scale, ctx.mask)
        return tuple(g if asked else None for g, asked in zip(grads, ctx.mask, strict=True))

    return backward


differentiable(linear_op, save, formula(linear_backward_op))
autocast("linear")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Kept | None,
        cols: Kept | None,
        scale: float,
    ) -> Tensor:
        """y [*, N'] = scale * x [*, K'] @ W[rows, cols]^T + b[rows]; the kept weight is held for the input gradient."""
        parts = _parts(x, weight, rows, cols)
        ctx.parts, ctx.scale, ctx.dtype, ctx.held = parts, scale, x.dtype, None
        wants_x, wants_weight, ctx.wants_bias = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        if not wants_x or parts.size > weight.numel():
            return _product(parts, x, bias, parts.gather(weight), scale)
        gathered = list(parts.gather(weight))
        # kept weights that together are no larger than the weight serve the input gradient too
        is_view = torch._C._is_alias_of(gathered[0], weight)  # type: ignore[attr-defined]
        if is_view or not worth_gathering_again(x, gathered[0]):
            ctx.held = gathered
        return _product(parts, x, bias, gathered, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """dx [*, K'], dW [N, K], db [N] from grad [*, N'] as far as they are asked for, and None for the rest."""
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if weight is not None:
            # held ones are freed before dW is allocated; a second backward (retain_graph) gathers anew, and with
            # create_graph the kept weights must be part of the graph
            held, ctx.held = None if torch.is_grad_enabled() else ctx.held, None
            gathered = ctx.parts.gather(weight) if held is None else held
            dx = _input_gradient(ctx.parts, grad, gathered, ctx.scale).to(ctx.dtype)
            del held, gathered
        if x is not None:
            dw = _weight_gradient(ctx.parts, grad, x, ctx.scale)
        if ctx.wants_bias:
            db = ctx.parts.bias_gradient(_flat(grad))
        return padded(ctx, dx, dw, db)


eager(linear_op, _Linear)
