"""gather(x)[..., j] = x[..., kept[j]]     scatter(y)[..., kept[j]] = y[..., j], 0 elsewhere.

Each is the other's derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import EAGER, define, eager, fresh, whole
from dropfx.ops.groups import by_row, gather_groups, scatter_groups
from dropfx.ops.kept import Kept


def _gather(x: Tensor, starts: Tensor, run: int, dim: int, leading: int = 0) -> Tensor:
    return fresh(gather_groups(x, dim, Kept(starts, run, leading)), x)


def _scatter(y: Tensor, starts: Tensor, run: int, dim: int, units: int, leading: int = 0) -> Tensor:
    return whole(scatter_groups(y, dim, Kept(starts, run, leading), units))


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty([size if d == dim % x.dim() else s for d, s in enumerate(x.shape)])


def _gather_fake(x: Tensor, starts: Tensor, run: int, dim: int, leading: int = 0) -> Tensor:
    return _resized(x, dim, starts.size(-1) * run)


def _scatter_fake(y: Tensor, starts: Tensor, run: int, dim: int, units: int, leading: int = 0) -> Tensor:
    return _resized(y, dim, units)


gather_op = define("gather", _gather, _gather_fake)
scatter_op = define("scatter", _scatter, _scatter_fake)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, starts, ctx.run, ctx.dim, ctx.leading = inputs
    ctx.units = x.size(ctx.dim)
    ctx.save_for_backward(starts)


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, starts, ctx.run, ctx.dim, _, ctx.leading = inputs
    ctx.save_for_backward(starts)


def gather_formula(scatter_units: Any) -> Callable[..., tuple[Any, ...]]:
    """The derivative of a gather by a scatter."""
    return lambda ctx, grad: (
        scatter_units(grad, *ctx.saved_tensors, ctx.run, ctx.dim, ctx.units, ctx.leading),
        *[None] * 4,
    )


def scatter_formula(gather_units: Any) -> Callable[..., tuple[Any, ...]]:
    """The derivative of a scatter by a gather."""
    return lambda ctx, grad: (gather_units(grad, *ctx.saved_tensors, ctx.run, ctx.dim, ctx.leading), *[None] * 5)


torch.library.register_autograd(gather_op, gather_formula(scatter_op), setup_context=_save_gather)
torch.library.register_autograd(scatter_op, scatter_formula(gather_op), setup_context=_save_scatter)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, starts: Tensor, run: int, dim: int, leading: int = 0) -> Tensor:
        """The kept units of axis `dim` of x."""
        _save_gather(ctx, (x, starts, run, dim, leading), x)
        return _gather(x, starts, run, dim, leading)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """grad at the places of the kept units, zeros elsewhere; None for the other arguments."""
        return gather_formula(EAGER[scatter_op])(ctx, grad)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, starts: Tensor, run: int, dim: int, units: int, leading: int = 0) -> Tensor:
        """y at the places of the kept units of axis `dim`, which gets `units` positions; zeros elsewhere."""
        _save_scatter(ctx, (y, starts, run, dim, units, leading), y)
        return _scatter(y, starts, run, dim, units, leading)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The kept units of grad; None for the other arguments."""
        return scatter_formula(EAGER[gather_op])(ctx, grad)


eager(gather_op, _Gather)
eager(scatter_op, _Scatter)


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
