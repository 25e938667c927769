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
from dropfx.ops.runs import Runs, put, put_weight, runs, take, take_weight, tile_index

_CHUNKS = 4
"""Parts in which a compact weight gradient is computed and scattered: bounds its memory, keeps it in cache."""
_MIN_CHUNK = 128


def _scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    # BLAS multiplies by alpha for free; with beta=0 the first operand is not read
    return a @ b if scale == 1.0 else torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def _forward(x: Tensor, compact: Tensor, bias: Tensor | None, rows: Runs | None, scale: float) -> Tensor:
    if x.size(-1) != compact.size(1):
        raise RuntimeError(f"gathered linear: input has {x.size(-1)} features, the kept weight {compact.size(1)}")
    kept_bias = bias if bias is None or rows is None else take(bias, 0, rows)
    if scale == 1.0:
        return F.linear(x, compact, kept_bias)
    flat = x.reshape(-1, x.size(-1))
    out = (
        _scaled_mm(flat, compact.t(), scale)
        if kept_bias is None
        else torch.addmm(kept_bias, flat, compact.t(), alpha=scale)
    )
    return out.view(*x.shape[:-1], out.size(1))


def _weight_gradient(
    dy: Tensor, x: Tensor, rows: Runs | None, cols: Runs | None, weight: Tensor, scale: float
) -> Tensor:
    shape = (weight.size(0), weight.size(1))
    tiles = None if torch.is_grad_enabled() or (rows is None and cols is None) else tile_index(rows, cols, shape)
    if tiles is None:
        return put_weight(_scaled_mm(dy.t(), x, scale).to(weight.dtype), rows, cols, shape)
    index, width = tiles
    dense = weight.new_zeros(shape)
    into = dense.view(-1, width)
    step = max(-(-dy.size(1) // _CHUNKS), _MIN_CHUNK)
    for part, where in zip(dy.split(step, 1), index.split(step * (x.size(1) // width)), strict=True):
        into.index_copy_(0, where, _scaled_mm(part.t(), x, scale).view(-1, width).to(weight.dtype))
    return dense


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    compact: Tensor | None,
    rows: Runs | None,
    cols: Runs | None,
    scale: float,
    mask: tuple[bool, bool, bool] | list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, bias) where `mask` asks for them; `compact` is the kept weight, if still at hand."""
    dy = grad.reshape(-1, grad.size(-1))
    dx = dw = db = None
    if mask[0]:
        if compact is None:
            compact = take_weight(weight, rows, cols)
        dx = _scaled_mm(dy, compact.to(dy.dtype), scale).view(x.shape).to(x.dtype)
    del compact  # before the dense gradient is allocated
    if mask[1]:
        dw = _weight_gradient(dy, x.reshape(-1, x.size(-1)).to(dy.dtype), rows, cols, weight, scale)
    if mask[2]:
        db = dy.sum(0).to(weight.dtype)
        db = db if rows is None else put(db, 0, rows, weight.size(0))
    return dx, dw, db


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
    kept_rows = runs(rows, row_run)
    return _forward(x, take_weight(weight, kept_rows, runs(cols, col_run)), bias, kept_rows, scale)


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
    wanted = _backward(grad, x, weight, None, runs(rows, row_run), runs(cols, col_run), scale, mask)
    dx, dw, db = (x.new_empty(0) if g is None else g for g in wanted)
    return dx, dw, db


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
    x, weight, bias, rows, ctx.row_run, cols, ctx.col_run, ctx.scale = inputs
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
        kept_rows = runs(rows, row_run)
        compact = take_weight(weight, kept_rows, runs(cols, col_run))
        out = _forward(x, compact, bias, kept_rows, scale)
        _save(ctx, (x, weight, bias, rows, row_run, cols, col_run, scale), out)
        # for the input gradient; a second backward (retain_graph) gathers anew
        ctx.compact = [compact] if ctx.mask[0] else []
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, rows, cols = ctx.saved_tensors
        # with create_graph the kept weight must be part of the graph
        compact = ctx.compact.pop() if ctx.compact and not torch.is_grad_enabled() else None
        kept_rows, kept_cols = runs(rows, ctx.row_run), runs(cols, ctx.col_run)
        return *_backward(grad, x, weight, compact, kept_rows, kept_cols, ctx.scale, ctx.mask), *[None] * 5


eager(linear_op, _Linear)
