"""residual_add(base, y)[..., kept[j]] = base[..., kept[j]] + alpha * y[..., j], base elsewhere.

`base` is broadcast to the dense shape of y first and never written into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import EAGER, define, eager
from dropfx.ops.groups import scatter_groups
from dropfx.ops.kept import Kept
from dropfx.ops.runs import gather
from dropfx.ops.units import gather_op


def dense_shape(y: Tensor, dim: int, units: int) -> list[int]:
    """y's shape with all `units` on axis `dim`."""
    return [units if d == dim % y.dim() else s for d, s in enumerate(y.shape)]


def _residual_add(
    base: Tensor, y: Tensor, starts: Tensor, run: int, dim: int, units: int, alpha: float, leading: int = 0
) -> Tensor:
    """dim counts from the end (negative), so that it names the same axis of both."""
    shape = torch.broadcast_shapes(base.shape, torch.Size(dense_shape(y, dim, units)))
    kept = Kept(starts, run, leading)
    dense = base.to(torch.result_type(base, y)).expand(shape)
    if kept.grouped or not kept.tile(units):
        return dense + scatter_groups(y * alpha, dim, kept, units)
    out = dense.clone(memory_format=torch.contiguous_format)
    tiled = out.unflatten(dim, (-1, run))
    axis = dim % len(shape)
    total = torch.add(gather(dense, dim, kept), y, alpha=alpha).unflatten(dim, (-1, run))
    tiled.index_copy_(axis, kept.blocks(), total)
    return out


def _fake(
    base: Tensor, y: Tensor, starts: Tensor, run: int, dim: int, units: int, alpha: float, leading: int = 0
) -> Tensor:
    shape = torch.broadcast_shapes(base.shape, torch.Size(dense_shape(y, dim, units)))
    return base.new_empty(shape, dtype=torch.result_type(base, y))


residual_add_op = define("residual_add", _residual_add, _fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, y, starts, ctx.run, ctx.dim, _, ctx.alpha, ctx.leading = inputs
    ctx.base, ctx.y = (base.shape, base.dtype), (y.shape, y.dtype)
    ctx.mask = ctx.needs_input_grad[:2]
    ctx.save_for_backward(starts)


def formula(gather_units: Any) -> Callable[..., tuple[Any, ...]]:
    """The derivative by a gather."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Gradients of base and y as far as they are asked for, summed where these were broadcast, and None."""
        (starts,) = ctx.saved_tensors
        base = grad.sum_to_size(ctx.base[0]).to(ctx.base[1]) if ctx.mask[0] else None
        y = None
        if ctx.mask[1]:
            taken = gather_units(grad, starts, ctx.run, ctx.dim, ctx.leading) * ctx.alpha
            y = taken.sum_to_size(ctx.y[0]).to(ctx.y[1])
        return base, y, *[None] * 6

    return backward


torch.library.register_autograd(residual_add_op, formula(gather_op), setup_context=_save)


class _ResidualAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        y: Tensor,
        starts: Tensor,
        run: int,
        dim: int,
        units: int,
        alpha: float,
        leading: int = 0,
    ) -> Tensor:
        """base + alpha * y with y's kept units at their places of axis `dim`; base is not written into."""
        inputs = base, y, starts, run, dim, units, alpha, leading
        out = _residual_add(*inputs)
        _save(ctx, inputs, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The kept units of grad for y, all of them for base, summed where these were broadcast."""
        return formula(EAGER[gather_op])(ctx, grad)


eager(residual_add_op, _ResidualAdd)
