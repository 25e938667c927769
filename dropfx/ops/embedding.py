"""y = W[ids][:, cols]: only the kept columns of the looked-up rows are read.

Shapes: ids [*], W [V, K], y [*, K'];  dW [V, K] is dense with zeros at dropped columns and at padding_idx.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import by, define, differentiable, eager, first_derivative_only, padded, whole
from dropfx.ops.groups import gather_groups, scatter_groups, tiles_by_row
from dropfx.ops.kept import Kept, save_kept, saved_kept
from dropfx.ops.runs import scatter


def _embedding(ids: Tensor, weight: Tensor, cols: Kept, padding_idx: int) -> Tensor:
    flat, units = ids.reshape(-1), weight.size(1)
    if cols.whole_runs(units) and weight.is_contiguous():
        tiles = tiles_by_row(cols, len(flat), units, flat)
        out = weight.view(-1, cols.run).index_select(0, tiles).view(-1, cols.width)
    else:
        out = gather_groups(weight.index_select(0, flat), 1, cols).contiguous()
    return whole(out.view(*ids.shape, out.size(1)))


def _embedding_backward(grad: Tensor, ids: Tensor, cols: Kept, padding_idx: int, rows: int, units: int) -> Tensor:
    flat, where = grad.reshape(-1, grad.size(-1)), ids.reshape(-1)
    if padding_idx >= 0:
        flat = flat * (where != padding_idx)[:, None]
    if cols.whole_runs(units):
        tiled = grad.new_zeros(rows * units // cols.run, cols.run)
        tiles = tiles_by_row(cols, len(flat), units, where)
        return tiled.index_add_(0, tiles, flat.reshape(-1, cols.run)).view(rows, units)
    if cols.grouped:
        return grad.new_zeros(rows, units).index_add_(0, where, scatter_groups(flat, 1, cols, units))
    return scatter(grad.new_zeros(rows, cols.width).index_add_(0, where, flat), 1, cols, units)


def _embedding_fake(ids: Tensor, weight: Tensor, cols: Kept, padding_idx: int) -> Tensor:
    return weight.new_empty([*ids.shape, cols.width])


def _embedding_backward_fake(grad: Tensor, ids: Tensor, cols: Kept, padding_idx: int, rows: int, units: int) -> Tensor:
    return grad.new_empty(rows, units)


embedding_op = define("embedding", _embedding, _embedding_fake)
embedding_backward_op = define("embedding_backward", _embedding_backward, _embedding_backward_fake)
first_derivative_only(embedding_backward_op)


def _save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ids, weight, cols, ctx.padding_idx = inputs
    ctx.shape = weight.shape
    save_kept(ctx, cols, tensors=(ids,))


def _grad(ctx: Any, grad: Tensor, function: Callable[..., Tensor]) -> tuple[None, Tensor]:
    (cols,), (ids,) = saved_kept(ctx)
    return None, function(grad, ids, cols, ctx.padding_idx, *ctx.shape)


differentiable(embedding_op, _save, lambda ctx, grad: _grad(ctx, grad, by(embedding_backward_op)))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, cols: Kept, padding_idx: int) -> Tensor:
        """Kept columns of the rows of weight [V, N] at `ids`: [*ids.shape, width]."""
        out = _embedding(ids, weight, cols, padding_idx)
        _save(ctx, (ids, weight, cols, padding_idx), out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """dW [V, N] from grad [*ids.shape, width], zeros in the dropped columns; None for the other arguments."""
        return padded(ctx, *_grad(ctx, grad, _embedding_backward))


eager(embedding_op, _Embedding)
