"""y = scale * x' @ W'^T + b[rows], where W' = W[rows][:, cols] is a value of its own: for graphs of compilers.

No opaque op, so that a compiler sees products and data movement of PyTorch's own in forward and backward, and fuses
them with what is around. The gradient of the weight goes past W', dense with exact zeros at the dropped places.

Shapes: x [*, K'], W [N, K], W' [N', K'], b [N], y [*, N']
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropfx.errors import DoubleBackwardError
from dropfx.ops.define import INSTEAD, by, grouped, padded, whole
from dropfx.ops.gathered_weight import gathered_weight_op, worth_gathering_again
from dropfx.ops.kept import Kept, save_kept, saved_kept
from dropfx.ops.linear import linear_op
from dropfx.ops.products import scaled_linear, scaled_mm
from dropfx.ops.runs import stored_transposed


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        compact: Tensor,
        bias: Tensor | None,
        rows: Kept | None,
        cols: Kept | None,
        scale: float,
    ) -> Tensor:
        """y [*, N'], in whose derivative `compact` stands for the weight."""
        ctx.again = worth_gathering_again(x, compact)
        save_kept(ctx, rows, cols, tensors=(x, weight if ctx.again else compact))
        ctx.scale, ctx.shape, ctx.dtype, ctx.flipped = scale, weight.shape, weight.dtype, stored_transposed(weight)
        if bias is not None and rows is not None:
            bias = bias.index_select(0, rows.units(bias.size(0)))  # a compiler has no number to begin a window at
        return whole(scaled_linear(x, compact, bias, scale))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of x, weight and bias as far as they are asked for.

        Raises:
            DoubleBackwardError: under create_graph, since W' is a constant here.
        """
        if torch.is_grad_enabled():
            raise DoubleBackwardError(f"a gathered linear has no second derivative here; {INSTEAD}")
        (rows, cols), (x, kept) = saved_kept(ctx)
        wants_x, wants_weight, _, wants_bias, *_ = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.size(-1))
        dx = dw = db = None
        if wants_x:
            compact = by(gathered_weight_op)(kept, rows, cols, grad) if ctx.again else kept
            dx = scaled_mm(dy, compact.to(dy.dtype), ctx.scale).to(x.dtype).view(x.shape)
        if wants_weight:
            flat, (n, k) = x.reshape(-1, x.size(-1)).to(dy.dtype), ctx.shape
            if ctx.flipped:
                dw = _spread(scaled_mm(flat.t(), dy, ctx.scale).to(ctx.dtype), (cols, k), (rows, n)).t()
            else:
                dw = _spread(scaled_mm(dy.t(), flat, ctx.scale).to(ctx.dtype), (rows, n), (cols, k))
        if wants_bias:
            db = _spread(dy.sum(0).to(ctx.dtype), (rows, ctx.shape[0]))
        return padded(ctx, dx, dw, None, db)


def _spread(y: Tensor, *axes: tuple[Kept | None, int]) -> Tensor:
    """`scatter` along all axes, each with its units, as code in which each place reads its own value or is zero.

    No zeros are written to be overwritten. Runs stay apart until the end: a compiler copies whole ones.
    """
    for dim, (kept, units) in reversed(list(enumerate(axes))):
        if kept is None:
            continue
        if kept.whole_runs(units):
            y = _read(y.unflatten(dim, (-1, kept.run)), dim, _slots(kept.blocks(), units // kept.run))
        else:
            slots = _slots(kept.unwrapped(), units + kept.run)
            # what goes past the end belongs to the first units
            wrapped = slots.new_full((units,), -1).slice_scatter(slots[units:], end=kept.run)
            y = _read(y, dim, slots[:units]) + _read(y, dim, wrapped)
    return y.reshape([units for _, units in axes])


def _slots(at: Tensor, places: int) -> Tensor:
    """For each place its index in `at`, -1 where it is not there."""
    return at.new_full((places,), -1).index_copy(0, at, torch.arange(at.numel(), device=at.device))


def _read(y: Tensor, dim: int, slots: Tensor) -> Tensor:
    """y at these indices of an axis, zero where they are -1."""
    shape = [-1 if d == dim else 1 for d in range(y.dim())]
    return y.index_select(dim, slots.clamp(min=0)).masked_fill((slots < 0).view(shape), 0)


def gathered_linear(x: Tensor, weight: Tensor, compact: Tensor, *rest: Any) -> Tensor:
    """The product, with the arguments of `linear_op` and, after the weight, `compact`.

    compact: W[rows][:, cols], by `gathered_weight_op`. W's own values are not read.
    """
    *_, bias, rows, cols, scale = grouped(linear_op, (x, weight, *rest))
    made: Tensor = _GatheredLinear.apply(x, weight, compact, bias, rows, cols, scale)  # type: ignore[no-untyped-call]
    return made
