"""take(x)[..., j] = x[..., kept[j]]     put(y)[..., kept[j]] = y[..., j], 0 elsewhere.

Each is the other's derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import EAGER, define, eager, fresh
from dropfx.ops.runs import Runs, put, take


def _take(x: Tensor, starts: Tensor, run: int, dim: int) -> Tensor:
    return fresh(take(x, dim, Runs(starts, run)))


def _put(y: Tensor, starts: Tensor, run: int, dim: int, units: int) -> Tensor:
    return put(y, dim, Runs(starts, run), units)


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty([size if d == dim % x.dim() else s for d, s in enumerate(x.shape)])


take_op = define("take", _take, lambda x, starts, run, dim: _resized(x, dim, starts.numel() * run))
put_op = define("put", _put, lambda y, starts, run, dim, units: _resized(y, dim, units))


def _save_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, starts, ctx.run, ctx.dim = inputs
    ctx.units = x.size(ctx.dim)
    ctx.save_for_backward(starts)


def _save_put(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, starts, ctx.run, ctx.dim, _ = inputs
    ctx.save_for_backward(starts)


torch.library.register_autograd(
    take_op,
    lambda ctx, grad: (put_op(grad, *ctx.saved_tensors, ctx.run, ctx.dim, ctx.units), None, None, None),
    setup_context=_save_take,
)
torch.library.register_autograd(
    put_op,
    lambda ctx, grad: (take_op(grad, *ctx.saved_tensors, ctx.run, ctx.dim), None, None, None, None),
    setup_context=_save_put,
)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, starts: Tensor, run: int, dim: int) -> Tensor:
        _save_take(ctx, (x, starts, run, dim), x)
        return _take(x, starts, run, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return EAGER[put_op](grad, *ctx.saved_tensors, ctx.run, ctx.dim, ctx.units), None, None, None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, starts: Tensor, run: int, dim: int, units: int) -> Tensor:
        _save_put(ctx, (y, starts, run, dim, units), y)
        return put(y, dim, Runs(starts, run), units)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return EAGER[take_op](grad, *ctx.saved_tensors, ctx.run, ctx.dim), None, None, None, None


eager(take_op, _Take)
eager(put_op, _Put)


def scale_units(x: Tensor, scale: float | Tensor, dim: int) -> Tensor:
    """x * scale along axis `dim`; a vector scale (padding of a ragged block) takes x's dtype first."""
    if isinstance(scale, Tensor):
        scale = scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))
    return x * scale
