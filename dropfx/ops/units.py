"""gather(x)[..., j] = x[..., kept[j]]     scatter(y)[..., kept[j]] = y[..., j], 0 elsewhere.

Each is the other's derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import by, define, differentiable, eager, fresh, padded, whole
from dropfx.ops.groups import by_row, gather_groups, scatter_groups
from dropfx.ops.kept import Kept, save_kept, saved_kept


def _gather(x: Tensor, kept: Kept, dim: int) -> Tensor:
    return fresh(gather_groups(x, dim, kept), x)


def _scatter(y: Tensor, kept: Kept, dim: int, units: int) -> Tensor:
    return whole(scatter_groups(y, dim, kept, units))


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty([size if d == dim % x.dim() else s for d, s in enumerate(x.shape)])


def _gather_fake(x: Tensor, kept: Kept, dim: int) -> Tensor:
    return _resized(x, dim, kept.width)


def _scatter_fake(y: Tensor, kept: Kept, dim: int, units: int) -> Tensor:
    return _resized(y, dim, units)


gather_op = define("gather", _gather, _gather_fake)
scatter_op = define("scatter", _scatter, _scatter_fake)


def save_gather(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """What `gather_formula` reads, of x, what is kept and the axis."""
    x, kept, ctx.dim = inputs
    ctx.units = x.size(ctx.dim)
    save_kept(ctx, kept)


def save_scatter(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """What `scatter_formula` reads, of y, what is kept, the axis and its units."""
    _, kept, ctx.dim, _ = inputs
    save_kept(ctx, kept)


def gather_formula(scatter_by: Callable[..., Tensor]) -> Callable[..., tuple[Any, ...]]:
    """The derivative of a gather by a scatter."""
    return lambda ctx, grad: (scatter_by(grad, saved_kept(ctx)[0][0], ctx.dim, ctx.units),)


def scatter_formula(gather_by: Callable[..., Tensor]) -> Callable[..., tuple[Any, ...]]:
    """The derivative of a scatter by a gather."""
    return lambda ctx, grad: (gather_by(grad, saved_kept(ctx)[0][0], ctx.dim),)


differentiable(gather_op, save_gather, gather_formula(by(scatter_op)))
differentiable(scatter_op, save_scatter, scatter_formula(by(gather_op)))


class Gather(torch.autograd.Function):
    """The eager face of a gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Kept, dim: int) -> Tensor:
        """The kept units of axis `dim` of x."""
        save_gather(ctx, (x, kept, dim), x)
        return _gather(x, kept, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """grad at the places of the kept units, zeros elsewhere; None for the other arguments."""
        return padded(ctx, *gather_formula(_Scatter.apply)(ctx, grad))


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, kept: Kept, dim: int, units: int) -> Tensor:
        """y at the places of the kept units of axis `dim`, which gets `units` positions; zeros elsewhere."""
        save_scatter(ctx, (y, kept, dim, units), y)
        return _scatter(y, kept, dim, units)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The kept units of grad; None for the other arguments."""
        return padded(ctx, *scatter_formula(Gather.apply)(ctx, grad))


eager(gather_op, Gather)
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
