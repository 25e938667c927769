"""Rows of a batch: taken for a branch that only they run through, and put back. Plain PyTorch, on any device.

`order` is how the axes of a dense value lie in memory, outermost first: views of the model behind it may rely on that,
and convolutions of channels-last values are faster.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

Order = tuple[int, ...]


def positions(rows: Tensor, factor: int) -> Tensor:
    """Places of the rows on an axis where each has `factor` neighbouring ones."""
    if factor == 1:
        return rows
    return (rows[:, None] * factor + torch.arange(factor, device=rows.device)).flatten()


def take_rows(x: Tensor, rows: Tensor, dim: int, factor: int, order: Order) -> Tensor:
    """x with the given rows alone, of which each has `factor` positions on axis `dim`."""
    taken = x.permute(order).index_select(order.index(dim), positions(rows, factor))
    return taken.permute(_back(order))


def add_rows(
    base: Tensor, y: Tensor, rows: Tensor, dim: int, scale: float | Tensor, kept: float, order: Order
) -> Tensor:
    """base, plus y * scale * kept at the rows; base is not written into."""
    dtype = torch.result_type(base, y)
    whole, part = base.to(dtype).permute(order).contiguous(), y.to(dtype).permute(order)
    axis = order.index(dim)
    if isinstance(scale, Tensor):
        total = whole.index_add(axis, rows, part * (scale * kept).to(dtype))
    else:
        total = whole.index_add(axis, rows, part, alpha=scale * kept)
    return total.permute(_back(order))


def put_rows(
    y: Tensor, rows: Tensor, dim: int, length: int, scale: float | Tensor, kept: float, order: Order
) -> Tensor:
    """Zeros of `length` rows, with y * scale * kept at the given ones."""
    shape = [length if axis == dim else size for axis, size in enumerate(y.shape)]
    return add_rows(y.new_zeros(shape), y, rows, dim, scale, kept, order)


def dropout_of_rows(input: Tensor, p: float, rows: Tensor, dim: int, factor: int, length: int, order: Order) -> Tensor:
    """Dropout of a value that has the given rows alone, by the mask of all rows, which PyTorch would draw.

    Args:
        input: kept rows, `factor` positions on axis `dim` for each.
        p: the drop rate.
        rows: int64 [k].
        dim: the axis of the rows.
        factor: positions of each row.
        length: of the axis with all rows.
        order: the axes of the value of all rows as they lie in memory: the mask is drawn so.
    """
    if has_torch_function_unary(input):  # `dropfx.disabled` turns it off, as it does any dropout
        return handle_torch_function(dropout_of_rows, (input,), input, p, rows, dim, factor, length, order)
    sizes = [length if axis == dim else input.size(axis) for axis in order]
    mask = F.dropout(input.new_ones(sizes), p).permute(_back(order))
    return input * mask.index_select(dim, positions(rows, factor))


def _back(order: Order) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]
