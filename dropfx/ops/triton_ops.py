"""The gathered ops by Triton kernels: `dropfx::linear_triton` and so on, with the arguments and meaning of their twins.

What the kernels do not serve (float64, tensors elsewhere, ragged blocks where values are put back, groups that differ
by axis) goes to the twin's own reference. Imported when first asked for, since it imports Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropfx import kernels
from dropfx.kernels import Axis
from dropfx.kernels.interpreter import INTERPRETED
from dropfx.ops import linear, residual, tiles
from dropfx.ops import units as unit_ops
from dropfx.ops.define import autocast, by, define, differentiable, first_derivative_only, whole
from dropfx.ops.kept import Kept, save_kept, saved_kept
from dropfx.ops.runs import stored_transposed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels multiply, with sums in float32."""

KERNELS: dict[Any, Any] = {}
"""Gathered op -> its twin."""


def _served(*tensors: Tensor) -> bool:
    first = tensors[0]
    here = first.device.type == "cuda" or INTERPRETED
    return here and first.dtype in DTYPES and all(t.dtype == first.dtype and t.device == first.device for t in tensors)


def _leading(rows: int, *axes: Kept | None) -> int | None:
    """The leading axis that all groups divide, 1 without groups; None where they are not the same."""
    grouped = [axis for axis in axes if axis is not None and axis.grouped]
    if not grouped:
        return 1
    if any(axis.ends(rows) != grouped[0].ends(rows) for axis in grouped[1:]):
        return None
    return max(grouped[0].leading, 1)


def _axis(kept: Kept | None, units: int) -> Axis:
    return Axis(None, 0, units) if kept is None else Axis(kept.starts, kept.run, units)


class Activation(NamedTuple):
    """A function, and its derivative from what it returned: `gradient(dy, y)`."""

    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


FROM_OUTPUT: dict[str, Activation] = {
    "relu": Activation(torch.relu, lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0)),
    "tanh": Activation(torch.tanh, torch.ops.aten.tanh_backward),
}
"""Activations that a product may apply before it stores its result, in training: the result is all that backward needs.

gelu and silu need what they were given. A product that stored both would write as much as the two operations do and
save one read, so theirs stay operations of their own, though the kernels' epilogue has them.
"""


# -- linear ---------------------------------------------------------------------------------------------------------


def _activated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Kept | None,
    cols: Kept | None,
    scale: float,
    activation: str,
) -> Tensor:
    flat = x.reshape(-1, x.size(-1))
    leading = _leading(len(flat), rows, cols)
    outs, sums = _axis(rows, weight.size(0)), _axis(cols, weight.size(1))
    if leading is None or not _served(x, weight, *([] if bias is None else [bias])):
        y = linear._linear(x, weight, bias, rows, cols, scale)
        return y if activation == "none" else FROM_OUTPUT[activation].function(y)
    if x.size(-1) != sums.width:
        raise RuntimeError(f"gathered linear: input has {x.size(-1)} features, the kept weight {sums.width}")
    bias = None if bias is None else bias.contiguous()
    out = kernels.gathered_matmul(
        flat, weight, outs, sums, bias=bias, scale=scale, activation=activation, leading=leading
    )
    return whole(out.view(*x.shape[:-1], outs.width))


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Kept | None, cols: Kept | None, scale: float
) -> Tensor:
    return _activated_linear(x, weight, bias, rows, cols, scale, "none")


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Kept | None,
    cols: Kept | None,
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dy, flat = grad.reshape(-1, grad.size(-1)), x.reshape(-1, x.size(-1))
    leading = _leading(len(dy), rows, cols)
    n, k = _axis(rows, weight.size(0)), _axis(cols, weight.size(1))
    if leading is None or n.ragged or k.ragged or not _served(grad, x, weight):
        return linear._linear_backward(grad, x, weight, rows, cols, scale, mask)
    dx, dw, db = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if mask[0]:
        dx = whole(kernels.gathered_matmul(dy, weight.t(), k, n, scale=scale, leading=leading).view(x.shape))
    if mask[1]:
        if stored_transposed(weight):
            dw = kernels.weight_gradient(flat, dy, k, n, scale, leading).t()
        else:
            dw = kernels.weight_gradient(dy, flat, n, k, scale, leading)
    if mask[2]:
        db = kernels.bias_gradient(dy, n, leading)
    return dx, dw, db


# -- tiled linear -----------------------------------------------------------------------------------------------------


def _tiled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile_rows: int,
    tile_cols: int,
    lattice: Tensor,
    scale: float,
) -> Tensor:
    if not _served(x, weight, *([] if bias is None else [bias])):
        return tiles._tiled_linear(x, weight, bias, tile_rows, tile_cols, lattice, scale)
    flat = x.reshape(-1, x.size(-1))
    if weight.size(1) != x.size(-1):
        raise RuntimeError(f"tiled linear: input has {x.size(-1)} features, the weight {weight.size(1)}")
    bias = None if bias is None else bias.contiguous()
    period, offset = lattice.tolist()
    out = kernels.tiled_matmul(flat, weight, (tile_rows, tile_cols), period, offset, bias=bias, scale=scale)
    return whole(out.view(*x.shape[:-1], weight.size(0)))


def _tiled_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    tile_rows: int,
    tile_cols: int,
    lattice: Tensor,
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if not _served(grad, x, weight):
        return tiles._tiled_linear_backward(grad, x, weight, tile_rows, tile_cols, lattice, scale, mask)
    dy, flat = grad.reshape(-1, grad.size(-1)), x.reshape(-1, x.size(-1))
    period, offset = lattice.tolist()
    dx, dw, db = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if mask[0]:
        dx = whole(
            kernels.tiled_matmul(dy, weight.t(), (tile_cols, tile_rows), period, offset, scale=scale).view(x.shape)
        )
    if mask[1]:
        dw = kernels.tiled_weight_gradient(dy, flat, (tile_rows, tile_cols), period, offset, scale)
    if mask[2]:
        db = kernels.bias_gradient(dy, Axis(None, 0, weight.size(0)))
    return dx, dw, db


# -- units ------------------------------------------------------------------------------------------------------------


def _gather(x: Tensor, kept: Kept, dim: int) -> Tensor:
    if not _served(x):
        return unit_ops._gather(x, kept, dim)
    return kernels.gather_units(x, dim, _axis(kept, x.size(dim)), _leading_of(x, dim, kept))


def _scatter(y: Tensor, kept: Kept, dim: int, units: int) -> Tensor:
    axis = _axis(kept, units)
    if axis.ragged or not _served(y):
        return unit_ops._scatter(y, kept, dim, units)
    return kernels.scatter_units(y, dim, axis, _leading_of(y, dim, kept))


def _residual_add(base: Tensor, y: Tensor, kept: Kept, dim: int, units: int, alpha: float) -> Tensor:
    axis = _axis(kept, units)
    shape = torch.Size(residual.dense_shape(y, dim, units))
    # a base with axes of its own would have y read several times
    if axis.ragged or not _served(base, y) or torch.broadcast_shapes(base.shape, shape) != shape:
        return residual._residual_add(base, y, kept, dim, units, alpha)
    return kernels.scatter_units(y, dim, axis, _leading_of(y, dim, kept), base.expand(shape), alpha)


def _leading_of(x: Tensor, dim: int, kept: Kept) -> int:
    return _leading(math.prod(x.shape[: dim % x.dim()]), kept) or 1


# -- linear and activation ----------------------------------------------------------------------------------------


def _save_activated(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    x, weight, _, rows, cols, ctx.scale, ctx.activation = inputs
    ctx.mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    save_kept(ctx, rows, cols, tensors=(x, weight, output))


def _activated_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    axes, (x, weight, y) = saved_kept(ctx)
    dz = FROM_OUTPUT[ctx.activation].gradient(grad, y)
    grads = by(_linear_backward_op)(dz, x, weight, *axes, ctx.scale, ctx.mask)
    return tuple(g if asked else None for g, asked in zip(grads, ctx.mask, strict=True))


# -- registration -----------------------------------------------------------------------------------------------------


def _twin(op: Any, forward: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    KERNELS[op] = define(f"{op.name().partition('::')[2]}_triton", forward, fake)
    return KERNELS[op]


_linear_op = _twin(linear.linear_op, _linear, linear._linear_fake)
_linear_backward_op = define("linear_backward_triton", _linear_backward, linear._linear_backward_fake)
activated_linear_op = define("activated_linear_triton", _activated_linear, linear._linear_fake)
_tiled_op = _twin(tiles.tiled_linear_op, _tiled_linear, tiles._tiled_linear_fake)
_tiled_backward_op = define("tiled_linear_backward_triton", _tiled_linear_backward, tiles._tiled_linear_backward_fake)
_gather_op = _twin(unit_ops.gather_op, _gather, unit_ops._gather_fake)
_scatter_op = _twin(unit_ops.scatter_op, _scatter, unit_ops._scatter_fake)
_residual_op = _twin(residual.residual_add_op, _residual_add, residual._fake)

for _op in (_linear_backward_op, _tiled_backward_op):
    first_derivative_only(_op, "dropfx.compile(model, lowering='aten') has one")
for _name in ("linear_triton", "activated_linear_triton", "tiled_linear_triton"):
    autocast(_name)
for _op, _save, _formula in (
    (_linear_op, linear.save, linear.formula(_linear_backward_op)),
    (activated_linear_op, _save_activated, _activated_formula),
    (_tiled_op, tiles.save, tiles.formula(_tiled_backward_op)),
    (_gather_op, unit_ops.save_gather, unit_ops.gather_formula(by(_scatter_op))),
    (_scatter_op, unit_ops.save_scatter, unit_ops.scatter_formula(by(_gather_op))),
    (_residual_op, residual.save, residual.formula(by(_gather_op))),
):
    differentiable(_op, _save, _formula)
