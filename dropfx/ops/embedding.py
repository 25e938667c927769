"""y = W[ids][:, cols]: only the kept columns of the looked-up rows are read.

Shapes: ids [*], W [V, K], y [*, K'];  dW [V, K] is dense with zeros at dropped columns and at padding_idx.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import define, eager, first_derivative_only
from dropfx.ops.runs import Runs, put, take


def _embedding(ids: Tensor, weight: Tensor, cols: Tensor, run: int, padding_idx: int) -> Tensor:
    kept = Runs(cols, run)
    if not kept.tile(weight.size(1)) or not weight.is_contiguous():
        return take(weight.index_select(0, ids.reshape(-1)), 1, kept).reshape(*ids.shape, kept.width)
    tiles = ids.reshape(-1, 1) * (weight.size(1) // run) + kept.blocks()
    return weight.view(-1, run).index_select(0, tiles.view(-1)).view(*ids.shape, kept.width)


def _embedding_backward(
    grad: Tensor, ids: Tensor, cols: Tensor, run: int, padding_idx: int, rows: int, units: int
) -> Tensor:
    kept = Runs(cols, run)
    flat, where = grad.reshape(-1, kept.width), ids.reshape(-1)
    if padding_idx >= 0:
        flat = flat * (where != padding_idx)[:, None]
    if not kept.tile(units):
        compact = flat.new_zeros(rows, kept.width).index_add(0, where, flat)
        return put(compact, 1, kept, units)
    tiles = (where[:, None] * (units // run) + kept.blocks()).view(-1)
    return flat.new_zeros(rows * units // run, run).index_add(0, tiles, flat.reshape(-1, run)).view(rows, units)


embedding_op = define(
    "embedding",
    _embedding,
    lambda ids, weight, cols, run, padding_idx: weight.new_empty([*ids.shape, cols.numel() * run]),
)
embedding_backward_op = define(
    "embedding_backward",
    _embedding_backward,
    lambda grad, ids, cols, run, padding_idx, rows, units: grad.new_empty(rows, units),
)
first_derivative_only(embedding_backward_op)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, cols, ctx.run, ctx.padding_idx = inputs
    ctx.shape = weight.shape
    ctx.save_for_backward(ids, cols)


def _grad(ctx: Any, grad: Tensor, function: Any) -> tuple[Any, ...]:
    ids, cols = ctx.saved_tensors
    return None, function(grad, ids, cols, ctx.run, ctx.padding_idx, *ctx.shape), None, None, None


torch.library.register_autograd(
    embedding_op, lambda ctx, grad: _grad(ctx, grad, embedding_backward_op), setup_context=_save
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = _embedding(*inputs)
        _save(ctx, inputs, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _grad(ctx, grad, _embedding_backward)


eager(embedding_op, _Embedding)
