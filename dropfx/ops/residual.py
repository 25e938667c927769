"""residual_add(base, y)[..., kept[j]] = base[..., kept[j]] + alpha * y[..., j], base elsewhere.

`base` is broadcast to the dense shape of y first and never written into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import by, define, differentiable, eager, padded
from dropfx.ops.groups import scatter_groups
from dropfx.ops.kept import Kept, save_kept, saved_kept
from dropfx.ops.runs import gather
from dropfx.ops.units import Gather, gather_op


def dense_shape(y: Tensor, dim: int, units: int) -> list[int]:
    """y's shape with all `units` on axis `dim`."""
    return [units if d == dim % y.dim() else s for d, s in enumerate(y.shape)]


def _residual_add(base: Tensor, y: Tensor, kept: Kept, dim: int, units: int, alpha: float) -> Tensor:
    """dim counts from the end (negative), so that it names the same axis of both."""
    shape = torch.broadcast_shapes(base.shape, torch.Size(dense_shape(y, dim, units)))
    dense = base.to(torch.result_type(base, y)).expand(shape)
    if kept.grouped or not kept.whole_runs(units):
        return dense + scatter_groups(y * alpha, dim, kept, units)
    out = dense.clone(memory_format=torch.contiguous_format)
    tiled = out.unflatten(dim, (-1, kept.run))
    axis = dim % len(shape)
    total = torch.add(gather(dense, dim, kept), y, alpha=alpha).unflatten(dim, (-1, kept.run))
    tiled.index_copy_(axis, kept.blocks(), total)
    return out


def _fake(base: Tensor, y: Tensor, kept: Kept, dim: int, units: int, alpha: float) -> Tensor:
    shape = torch.broadcast_shapes(base.shape, torch.Size(dense_shape(y, dim, units)))
    return base.new_empty(shape, dtype=torch.result_type(base, y))


residual_add_op = define("residual_add", _residual_add, _fake)


def save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """What `formula` reads, of base, y, what is kept, the axis, its units and alpha."""
    base, y, kept, ctx.dim, _, ctx.alpha = inputs
    ctx.base, ctx.y = (base.shape, base.dtype), (y.shape, y.dtype)
    ctx.mask = ctx.needs_input_grad[:2]
    save_kept(ctx, kept)


def formula(gather_by: Callable[..., Tensor]) -> Callable[..., tuple[Any, ...]]:
    """The derivative by a gather."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Gradients of base and y as far as they are asked for, summed where these were broadcast."""
        ((kept,), _) = saved_kept(ctx)
        base = grad.sum_to_size(ctx.base[0]).to(ctx.base[1]) if ctx.mask[0] else None
        y = None
        if ctx.mask[1]:
            y = (gather_by(grad, kept, ctx.dim) * ctx.alpha).sum_to_size(ctx.y[0]).to(ctx.y[1])
        return base, y

    return backward


differentiable(residual_add_op, save, formula(by(gather_op)))


class _ResidualAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, y: Tensor, kept: Kept, dim: int, units: int, alpha: float) -> Tensor:
        """base + alpha * y with y's kept units at their places of axis `dim`; base is not written into."""
        inputs = base, y, kept, dim, units, alpha
        out = _residual_add(*inputs)
        save(ctx, inputs, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The kept units of grad for y, all of them for base, summed where these were broadcast."""
        return padded(ctx, *formula(Gather.apply)(ctx, grad))


eager(residual_add_op, _ResidualAdd)
