"""Rows of a batch: taken for a branch that only they run through, and put back. Plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(rows: Tensor, factor: int) -> Tensor:
    """Places of the rows on an axis where each has `factor` neighbouring ones."""
    if factor == 1:
        return rows
    return (rows[:, None] * factor + torch.arange(factor, device=rows.device)).flatten()


def take_rows(x: Tensor, rows: Tensor, dim: int, factor: int) -> Tensor:
    """x with the given rows alone, of which each has `factor` positions on axis `dim`."""
    return x.index_select(dim, positions(rows, factor))


def add_rows(base: Tensor, y: Tensor, rows: Tensor, dim: int, scale: float | Tensor, kept: float) -> Tensor:
    """base, plus y * scale * kept at the rows; base is not written into."""
    dtype = torch.result_type(base, y)
    base, y = base.to(dtype), y.to(dtype)
    if isinstance(scale, Tensor):
        return base.index_add(dim, rows, y * (scale * kept).to(dtype))
    return base.index_add(dim, rows, y, alpha=scale * kept)


def put_rows(y: Tensor, rows: Tensor, dim: int, length: int, scale: float | Tensor, kept: float) -> Tensor:
    """Zeros of `length` rows, with y * scale * kept at the given ones."""
    shape = [*y.shape]
    shape[dim] = length
    return add_rows(y.new_zeros(shape), y, rows, dim, scale, kept)
