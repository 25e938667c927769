"""y = scale * x' @ W[rows][:, cols]^T + b[rows]

x' is compact where `cols` is given, y where `rows` is: forward, input gradient, weight gradient and bias gradient all
multiply kept units only. The weight's gradient arrives dense with exact zeros at the dropped places.

Shapes: x [*, K'], W [N, K], b [N], y [*, N'];  M = product of the leading dimensions
    dX [M, K'] = scale * dY [M, N'] @ W[rows][:, cols] [N', K']
    dW [N, K]  = put(scale * dY^T [N', M] @ X [M, K'])
    db [N]     = put(sum over M of dY)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dropfx.ops.define import define, eager, first_derivative_only
from dropfx.ops.runs import KeptWeight, put, runs, take

_CHUNKS = 4
"""Parts in which a compact weight gradient is computed and scattered: bounds its memory, keeps it in cache."""
_MIN_CHUNK = 128


def _scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    # BLAS multiplies by alpha for free; with beta=0 the first operand is not read
    return a @ b if scale == 1.0 else torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def _forward(x: Tensor, compact: Tensor, bias: Tensor | None, kept: KeptWeight, scale: float) -> Tensor:
    if x.size(-1) != compact.size(1):
        raise RuntimeError(f"gathered linear: input has {x.size(-1)} features, the kept weight {compact.size(1)}")
    kept_bias = bias if bias is None or kept.rows is None else take(bias, 0, kept.rows)
    if scale == 1.0:
        return F.linear(x, compact, kept_bias)
    flat = x.reshape(-1, x.size(-1))
    out = (
        _scaled_mm(flat, compact.t(), scale)
        if kept_bias is None
        else torch.addmm(kept_bias, flat, compact.t(), alpha=scale)
    )
    return out.view(*x.shape[:-1], out.size(1))


def _input_gradient(grad: Tensor, compact: Tensor, scale: float) -> Tensor:
    dx = _scaled_mm(grad.reshape(-1, grad.size(-1)), compact.to(grad.dtype), scale)
    return dx.view(*grad.shape[:-1], compact.size(1))


def _weight_gradient(grad: Tensor, x: Tensor, kept: KeptWeight, scale: float) -> Tensor:
    dy, x = grad.reshape(-1, grad.size(-1)), x.reshape(-1, x.size(-1)).to(grad.dtype)
    stretches = None if torch.is_grad_enabled() or kept.dtype != dy.dtype else kept.stretches()
    if stretches is not None:
        dense = x.new_zeros(kept.n, kept.k)
        for here, there, length in stretches:
            into = dense.narrow(0, there, length)
            torch.addmm(into, dy.narrow(1, here, length).t(), x, beta=0, alpha=scale, out=into)
        return dense
    tiles = None if torch.is_grad_enabled() else kept.tiles
    if tiles is None:
        return kept.put(_scaled_mm(dy.t(), x, scale).to(kept.dtype))
    index, width = tiles
    dense = x.new_zeros(kept.n, kept.k, dtype=kept.dtype)
    into = dense.view(-1, width)
    step = max(-(-dy.size(1) // _CHUNKS), _MIN_CHUNK)
    for part, where in zip(dy.split(step, 1), index.split(step * (x.size(1) // width)), strict=True):
        into.index_copy_(0, where, _scaled_mm(part.t(), x, scale).view(-1, width).to(kept.dtype))
    return dense


def _bias_gradient(grad: Tensor, kept: KeptWeight) -> Tensor:
    db = grad.reshape(-1, grad.size(-1)).sum(0).to(kept.dtype)
    return db if kept.rows is None else put(db, 0, kept.rows, kept.n)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    row_run: int,
    cols: Tensor | None,
    col_run: int,
    scale: float,
) -> Tensor:
    kept = KeptWeight(weight, runs(rows, row_run), runs(cols, col_run))
    return _forward(x, kept.take(weight), bias, kept, scale)


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    row_run: int,
    cols: Tensor | None,
    col_run: int,
    scale: float,
) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.size(0) if rows is None else rows.numel() * row_run])


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    row_run: int,
    cols: Tensor | None,
    col_run: int,
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    kept = KeptWeight(weight, runs(rows, row_run), runs(cols, col_run))
    return (
        _input_gradient(grad, kept.take(weight), scale).to(x.dtype) if mask[0] else x.new_empty(0),
        _weight_gradient(grad, x, kept, scale) if mask[1] else weight.new_empty(0),
        _bias_gradient(grad, kept) if mask[2] else weight.new_empty(0),
    )


def _linear_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    row_run: int,
    cols: Tensor | None,
    col_run: int,
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if mask[0] else 0),
        weight.new_empty(weight.shape if mask[1] else 0),
        weight.new_empty(weight.size(0) if mask[2] else 0),
    )


linear_op = define("linear", _linear, _linear_fake)
linear_backward_op = define("linear_backward", _linear_backward, _linear_backward_fake)
first_derivative_only(linear_backward_op)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, rows, ctx.row_run, cols, ctx.col_run, ctx.scale = inputs
    ctx.mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    ctx.save_for_backward(x, weight, rows, cols)


def _linear_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rows, cols = ctx.saved_tensors
    grads = linear_backward_op(grad, x, weight, rows, ctx.row_run, cols, ctx.col_run, ctx.scale, ctx.mask)
    return *(g if asked else None for g, asked in zip(grads, ctx.mask, strict=True)), *[None] * 5


torch.library.register_autograd(linear_op, _linear_autograd, setup_context=_save)


def _autocast(device: str) -> Any:
    # torch.library.register_autocast fixes the dtype at registration; a user's autocast may name another
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return linear_op(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *rest)  # type: ignore[no-any-return]

    return kernel


_library = torch.library.Library("dropfx", "FRAGMENT")  # kept: dropping it would unregister the kernels
for _device in ("cpu", "cuda"):
    _library.impl("linear", _autocast(_device), f"Autocast{_device.upper()}")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        row_run: int,
        cols: Tensor | None,
        col_run: int,
        scale: float,
    ) -> Tensor:
        ctx.kept = KeptWeight(weight, runs(rows, row_run), runs(cols, col_run))
        compact = ctx.kept.take(weight)
        ctx.scale, ctx.dtype = scale, x.dtype
        wants_x, wants_weight, ctx.wants_bias = ctx.needs_input_grad[:3]
        # the kept weight serves the input gradient; a second backward (retain_graph) gathers anew
        ctx.compact = [compact] if wants_x else []
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return _forward(x, compact, bias, ctx.kept, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if weight is not None:
            # with create_graph the kept weight must be part of the graph; it is freed before dW is allocated
            reuse = ctx.compact and not torch.is_grad_enabled()
            dx = _input_gradient(grad, ctx.compact.pop() if reuse else ctx.kept.take(weight), ctx.scale).to(ctx.dtype)
        if x is not None:
            dw = _weight_gradient(grad, x, ctx.kept, ctx.scale)
        if ctx.wants_bias:
            db = _bias_gradient(grad, ctx.kept)
        return dx, dw, db, *[None] * 5


eager(linear_op, _Linear)
