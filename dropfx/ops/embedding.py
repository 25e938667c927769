"""y = W[ids][:, cols]: only the kept columns of the looked-up rows are read.

Shapes: ids [*], W [V, K], y [*, K'];  dW [V, K] is dense with zeros at dropped columns and at padding_idx.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import define, eager, first_derivative_only, whole
from dropfx.ops.groups import pieces
from dropfx.ops.kept import Kept
from dropfx.ops.runs import gather, scatter


def _embedding(ids: Tensor, weight: Tensor, cols: Tensor, run: int, padding_idx: int, leading: int = 0) -> Tensor:
    flat = ids.reshape(-1)
    parts = pieces(len(flat), Kept(cols, run, leading))
    found = [_look_up(flat[p.low : p.high], weight, p.kept[0]) for p in parts]
    out = found[0] if len(found) == 1 else torch.cat(found)
    return whole(out.view(*ids.shape, out.size(1)))


def _look_up(ids: Tensor, weight: Tensor, kept: Kept | None) -> Tensor:
    assert kept is not None
    if not kept.tile(weight.size(1)) or not weight.is_contiguous():
        return gather(weight.index_select(0, ids), 1, kept).contiguous()
    tiles = ids[:, None] * (weight.size(1) // kept.run) + kept.blocks()
    return weight.view(-1, kept.run).index_select(0, tiles.view(-1)).view(-1, kept.width)


def _embedding_backward(
    grad: Tensor, ids: Tensor, cols: Tensor, run: int, padding_idx: int, rows: int, units: int, leading: int = 0
) -> Tensor:
    flat, where = grad.reshape(-1, grad.size(-1)), ids.reshape(-1)
    if padding_idx >= 0:
        flat = flat * (where != padding_idx)[:, None]
    parts = pieces(len(flat), Kept(cols, run, leading))
    total: Tensor | None = None
    for part in parts:
        here = _spread(flat[part.low : part.high], where[part.low : part.high], part.kept[0], rows, units)
        total = here if total is None else total + here
    assert total is not None
    return total


def _spread(grad: Tensor, ids: Tensor, kept: Kept | None, rows: int, units: int) -> Tensor:
    assert kept is not None
    if not kept.tile(units):
        compact = grad.new_zeros(rows, kept.width).index_add_(0, ids, grad)
        return scatter(compact, 1, kept, units)
    tiles = (ids[:, None] * (units // kept.run) + kept.blocks()).view(-1)
    tiled = grad.new_zeros(rows * units // kept.run, kept.run)
    return tiled.index_add_(0, tiles, grad.reshape(-1, kept.run)).view(rows, units)


def _embedding_fake(ids: Tensor, weight: Tensor, cols: Tensor, run: int, padding_idx: int, leading: int = 0) -> Tensor:
    return weight.new_empty([*ids.shape, cols.size(-1) * run])


def _embedding_backward_fake(
    grad: Tensor, ids: Tensor, cols: Tensor, run: int, padding_idx: int, rows: int, units: int, leading: int = 0
) -> Tensor:
    return grad.new_empty(rows, units)


embedding_op = define("embedding", _embedding, _embedding_fake)
embedding_backward_op = define("embedding_backward", _embedding_backward, _embedding_backward_fake)
first_derivative_only(embedding_backward_op)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, cols, ctx.run, ctx.padding_idx, ctx.leading = inputs
    ctx.shape = weight.shape
    ctx.save_for_backward(ids, cols)


def _grad(ctx: Any, grad: Tensor, function: Any) -> tuple[Any, ...]:
    ids, cols = ctx.saved_tensors
    return None, function(grad, ids, cols, ctx.run, ctx.padding_idx, *ctx.shape, ctx.leading), *[None] * 4


torch.library.register_autograd(
    embedding_op, lambda ctx, grad: _grad(ctx, grad, embedding_backward_op), setup_context=_save
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, cols: Tensor, run: int, padding_idx: int, leading: int = 0
    ) -> Tensor:
        """Kept columns of the rows of weight [V, N] at `ids`: [*ids.shape, width]."""
        out = _embedding(ids, weight, cols, run, padding_idx, leading)
        _save(ctx, (ids, weight, cols, run, padding_idx, leading), out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """dW [V, N] from grad [*ids.shape, width], zeros in the dropped columns; None for the other arguments."""
        return _grad(ctx, grad, _embedding_backward)


eager(embedding_op, _Embedding)
