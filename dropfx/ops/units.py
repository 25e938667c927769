"""take(x)[..., j] = x[..., kept[j]]     put(y)[..., kept[j]] = y[..., j], 0 elsewhere.

Each is the other's derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import EAGER, define, eager, fresh, whole
from dropfx.ops.groups import KeptAxis, by_row, put_groups, take_groups


def _take(x: Tensor, starts: Tensor, run: int, dim: int, leading: int = 0) -> Tensor:
    return fresh(take_groups(x, dim, KeptAxis(starts, run, leading)), x)


def _put(y: Tensor, starts: Tensor, run: int, dim: int, units: int, leading: int = 0) -> Tensor:
    return whole(put_groups(y, dim, KeptAxis(starts, run, leading), units))


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty([size if d == dim % x.dim() else s for d, s in enumerate(x.shape)])


def _take_fake(x: Tensor, starts: Tensor, run: int, dim: int, leading: int = 0) -> Tensor:
    return _resized(x, dim, starts.size(-1) * run)


def _put_fake(y: Tensor, starts: Tensor, run: int, dim: int, units: int, leading: int = 0) -> Tensor:
    return _resized(y, dim, units)


take_op = define("take", _take, _take_fake)
put_op = define("put", _put, _put_fake)


def _save_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, starts, ctx.run, ctx.dim, ctx.leading = inputs
    ctx.units = x.size(ctx.dim)
    ctx.save_for_backward(starts)


def _save_put(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, starts, ctx.run, ctx.dim, _, ctx.leading = inputs
    ctx.save_for_backward(starts)


def take_formula(put_units: Any) -> Callable[..., tuple[Any, ...]]:
    """The derivative of a take by a put."""
    return lambda ctx, grad: (
        put_units(grad, *ctx.saved_tensors, ctx.run, ctx.dim, ctx.units, ctx.leading),
        *[None] * 4,
    )


def put_formula(take_units: Any) -> Callable[..., tuple[Any, ...]]:
    """The derivative of a put by a take."""
    return lambda ctx, grad: (take_units(grad, *ctx.saved_tensors, ctx.run, ctx.dim, ctx.leading), *[None] * 5)


torch.library.register_autograd(take_op, take_formula(put_op), setup_context=_save_take)
torch.library.register_autograd(put_op, put_formula(take_op), setup_context=_save_put)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, starts: Tensor, run: int, dim: int, leading: int = 0) -> Tensor:
        """The kept units of axis `dim` of x."""
        _save_take(ctx, (x, starts, run, dim, leading), x)
        return _take(x, starts, run, dim, leading)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """grad at the places of the kept units, zeros elsewhere; None for the other arguments."""
        return take_formula(EAGER[put_op])(ctx, grad)


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, starts: Tensor, run: int, dim: int, units: int, leading: int = 0) -> Tensor:
        """y at the places of the kept units of axis `dim`, which gets `units` positions; zeros elsewhere."""
        _save_put(ctx, (y, starts, run, dim, units, leading), y)
        return _put(y, starts, run, dim, units, leading)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The kept units of grad; None for the other arguments."""
        return put_formula(EAGER[take_op])(ctx, grad)


eager(take_op, _Take)
eager(put_op, _Put)


def scale_units(x: Tensor, scale: float | Tensor, dim: int) -> Tensor:
    """x * scale along axis `dim`; a vector scale (padding) takes x's dtype first, one a group is spread over its rows.

    Shapes: scale a float, [units], or [groups, units] with x [leading, ..., units, ...].
    """
    if not isinstance(scale, Tensor):
        return x * scale
    behind = [1] * (x.dim() - 1 - dim % x.dim())
    if scale.dim() == 2:
        scale = by_row(scale, x.size(0))
        between = [1] * (dim % x.dim() - 1)
        return x * scale.to(x.dtype).view(x.size(0), *between, scale.size(1), *behind)
    return x * scale.to(x.dtype).view(-1, *behind)


def spread_rows(x: Tensor, like: Tensor, dim: int) -> Tensor:
    """x without rows of its own, expanded to those of `like`: the axes before axis `dim` (negative), without a copy."""
    return x.expand(*like.shape[:dim], *x.shape[dim:])
