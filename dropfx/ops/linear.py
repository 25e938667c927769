"""y = scale * x' @ W[rows][:, cols]^T + b[rows]

x' is compact where `cols` is given, y where `rows` is: forward, input gradient, weight gradient and bias gradient all
multiply kept units only. The weight's gradient arrives dense with exact zeros at the dropped places.

Shapes: x [*, K'], W [N, K], b [N], y [*, N'];  M = product of the leading dimensions
    dX [M, K'] = scale * dY [M, N'] @ W[rows][:, cols] [N', K']
    dW [N, K]  = scatter(scale * dY^T [N', M] @ X [M, K'])
    db [N]     = scatter(sum over M of dY)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropfx.ops.define import autocast, by, define, differentiable, eager, first_derivative_only, padded, whole
from dropfx.ops.gathered_weight import worth_gathering_again
from dropfx.ops.groups import pieces
from dropfx.ops.kept import Kept, save_kept, saved_kept
from dropfx.ops.products import aligned_mm, misaligned, scaled_linear, scaled_mm
from dropfx.ops.runs import GatheredWeight, gather, scatter, stored_transposed

_PARTS = 4
"""A compact weight gradient is made and scattered in parts of at most the dense one's size over this: bounds memory."""


def _forward(x: Tensor, compact: Tensor, bias: Tensor | None, kept: GatheredWeight, scale: float) -> Tensor:
    if x.size(-1) != compact.size(1):
        raise RuntimeError(f"gathered linear: input has {x.size(-1)} features, the kept weight {compact.size(1)}")
    kept_bias = bias if bias is None or kept.rows is None else gather(bias, 0, kept.rows)
    return whole(scaled_linear(x, compact, kept_bias, scale))


def _input_gradient(grad: Tensor, compact: Tensor, scale: float) -> Tensor:
    return scaled_mm(grad, compact.to(grad.dtype), scale)


def _weight_gradient(dense: Tensor | None, dy: Tensor, x: Tensor, kept: GatheredWeight, scale: float) -> Tensor:
    """dense + the gradient from these rows, in place; where `dense` is None, a new tensor, stored as the weight is."""
    if kept.flipped is not None:
        return _weight_gradient(None if dense is None else dense.t(), x, dy, kept.flipped, scale).t()
    if torch.is_grad_enabled():
        made = kept.scatter(scaled_mm(dy.t(), x, scale).to(kept.dtype))
        return made if dense is None else dense + made
    if dense is None and kept.dtype == dy.dtype and (starts := kept.row_blocks()) is not None:
        return _product_in_rows(dy, x, kept, starts, scale)
    if kept.block_index is None:
        product = scaled_mm(dy.t(), x, scale).to(kept.dtype)
        return kept.scatter(product) if dense is None else kept.add(dense, product)
    add = dense is not None
    dense = x.new_zeros(kept.n, kept.k, dtype=kept.dtype) if dense is None else dense
    parts = -(-_PARTS * dy.size(1) * x.size(1) // dense.numel())
    step = -(-dy.size(1) // parts)
    # below no product is given a name: one is freed before the next is made
    if kept.rows is None and kept.cols is not None and misaligned(x):
        blocks, width = kept.cols.blocks(), kept.cols.run
        for part, there in zip(dy.split(step, 1), dense.view(kept.n, -1, width).split(step), strict=True):
            write = there.index_add_ if add else there.index_copy_
            write(1, blocks, aligned_mm(part.t(), x, scale).unflatten(1, (-1, width)).to(kept.dtype))
        return dense
    index, width = kept.block_index
    write = dense.view(-1, width).index_add_ if add else dense.view(-1, width).index_copy_
    for part, where in zip(dy.split(step, 1), index.split(step * (x.size(1) // width)), strict=True):
        write(0, where, scaled_mm(part.t(), x, scale).view(-1, width).to(kept.dtype))
    return dense


def _product_in_rows(dy: Tensor, x: Tensor, kept: GatheredWeight, starts: list[int], scale: float) -> Tensor:
    """The gradient where whole rows are kept, in its own memory.

    The product fills the first rows; then its blocks of rows move to their places, the last one first: no place lies
    before what has to move there, and blocks do not overlap.
    """
    run = dy.size(1) // len(starts)
    dense = x.new_empty(kept.n, kept.k)
    compact = dense[: dy.size(1)]
    torch.addmm(compact, dy.t(), x, beta=0, alpha=scale, out=compact)
    end = kept.n
    for number, start in reversed(list(enumerate(starts))):
        if start > number * run:
            dense[start : start + run] = dense[number * run : (number + 1) * run]
        dense[start + run : end].zero_()
        end = start
    dense[:end].zero_()
    return dense


def _bias_gradient(grad: Tensor, kept: GatheredWeight) -> Tensor:
    db = grad.sum(0).to(kept.dtype)
    return db if kept.rows is None else scatter(db, 0, kept.rows, kept.n)


class _Part(NamedTuple):
    """Rows of x and y in which one draw of each axis holds."""

    low: int
    high: int
    kept: GatheredWeight


def _parts(x: Tensor, weight: Tensor, rows: Kept | None, cols: Kept | None) -> list[_Part]:
    if not any(kept is not None and kept.grouped for kept in (rows, cols)):
        return [_Part(0, _rows(x), GatheredWeight(weight, rows, cols))]
    return [_Part(p.low, p.high, GatheredWeight(weight, *p.kept)) for p in pieces(_rows(x), rows, cols)]


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[_Part], scale: float) -> Tensor:
    flat = x.reshape(-1, x.size(-1))
    found = [_forward(flat[low:high], kept.gather(weight), bias, kept, scale) for low, high, kept in parts]
    return whole(torch.cat(found).view(*x.shape[:-1], found[0].size(1)))


def _gradients(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: bool,
    parts: list[_Part],
    scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX where `weight` is given, dW where `x` is, db where `bias`."""
    dy = grad.reshape(-1, grad.size(-1))
    dx = dw = db = None
    if weight is not None:
        found = [_input_gradient(dy[low:high], kept.gather(weight), scale) for low, high, kept in parts]
        dx = found[0] if len(found) == 1 else torch.cat(found)
        dx = dx.view(*grad.shape[:-1], dx.size(1))
    if x is not None:
        flat = x.reshape(-1, x.size(-1)).to(dy.dtype)
        for low, high, kept in parts:
            dw = _weight_gradient(dw, dy[low:high], flat[low:high], kept, scale)
    if bias:
        for low, high, kept in parts:
            here = _bias_gradient(dy[low:high], kept)
            db = here if db is None else db + here
    return dx, dw, db


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Kept | None, cols: Kept | None, scale: float
) -> Tensor:
    parts = _parts(x, weight, rows, cols)
    if len(parts) == 1:
        kept = parts[0].kept
        return _forward(x, kept.gather(weight), bias, kept, scale)
    return _product(x, weight, bias, parts, scale)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Kept | None, *_: Any) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.size(0) if rows is None else rows.width])


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Kept | None,
    cols: Kept | None,
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    parts = _parts(x, weight, rows, cols)
    asked = x if mask[1] else None, weight if mask[0] else None, mask[2]
    dx, dw, db = _gradients(grad, *asked, parts, scale)
    return (
        x.new_empty(0) if dx is None else dx.to(x.dtype),
        weight.new_empty(0) if dw is None else dw,
        weight.new_empty(0) if db is None else db,
    )


def _linear_backward_fake(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    mask: list[bool] = rest[-1]
    return (
        x.new_empty(x.shape if mask[0] else 0),
        _like(weight) if mask[1] else weight.new_empty(0),
        weight.new_empty(weight.size(0) if mask[2] else 0),
    )


def _like(weight: Tensor) -> Tensor:
    return torch.empty_like(weight.t()).t() if stored_transposed(weight) else weight.new_empty(weight.shape)


linear_op = define("linear", _linear, _linear_fake)
linear_backward_op = define("linear_backward", _linear_backward, _linear_backward_fake)
first_derivative_only(linear_backward_op)


def save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """What `formula` reads, of x, W, b, rows, cols and scale."""
    x, weight, _, rows, cols, ctx.scale, *_ = inputs
    ctx.mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    save_kept(ctx, rows, cols, tensors=(x, weight))


def formula(backward_op: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    """The derivative by a registered op."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dx, dW and db as far as they are asked for."""
        axes, (x, weight) = saved_kept(ctx)
        grads = by(backward_op)(grad, x, weight, *axes, ctx.scale, ctx.mask)
        return tuple(g if asked else None for g, asked in zip(grads, ctx.mask, strict=True))

    return backward


differentiable(linear_op, save, formula(linear_backward_op))
autocast("linear")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Kept | None,
        cols: Kept | None,
        scale: float,
    ) -> Tensor:
        """y [*, N'] = scale * x [*, K'] @ W[rows, cols]^T + b[rows]; the kept weight is held for the input gradient."""
        parts = _parts(x, weight, rows, cols)
        ctx.parts, ctx.scale, ctx.dtype, ctx.compact = parts, scale, x.dtype, None
        wants_x, wants_weight, ctx.wants_bias = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        if len(parts) > 1:
            return _product(x, weight, bias, parts, scale)
        compact = parts[0].kept.gather(weight)
        # one kept weight serves the input gradient too; of several groups they would add up
        is_view = torch._C._is_alias_of(compact, weight)  # type: ignore[attr-defined]
        if wants_x and (is_view or not worth_gathering_again(x, compact)):
            ctx.compact = compact
        return _forward(x, compact, bias, parts[0].kept, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """dx [*, K'], dW [N, K], db [N] from grad [*, N'] as far as they are asked for, and None for the rest."""
        x, weight = ctx.saved_tensors
        dx = None
        if ctx.compact is not None and not torch.is_grad_enabled():
            # freed before dW is allocated; a second backward (retain_graph) gathers anew, and with create_graph the
            # kept weight must be part of the graph
            flat = _input_gradient(grad.reshape(-1, grad.size(-1)), ctx.compact, ctx.scale)
            dx, ctx.compact, weight = flat.view(*grad.shape[:-1], flat.size(1)), None, None
        made, dw, db = _gradients(grad, x, weight, ctx.wants_bias, ctx.parts, ctx.scale)
        dx = made if dx is None else dx
        return padded(ctx, None if dx is None else dx.to(ctx.dtype), dw, db)


eager(linear_op, _Linear)
