"""Moving the kept runs of an axis: the reference data movement that every gathered op is made of.

Whole runs are copied, never single elements, where the axis divides into runs; a single run (a window) is a view.
All functions are out of place and differentiable, so double backward through them works.

Legend: N, K dense sizes of a weight's rows and columns; N', K' compact ones; b units in a run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MIN_RUN = 8
"""Shortest run that is worth copying as a row of its own; below it two element-wise stages are faster."""


class Runs(NamedTuple):
    """Kept runs of an axis: starts int64 [count], `run` units each, positions modulo the axis' length."""

    starts: Tensor
    run: int

    @property
    def width(self) -> int:
        return self.starts.numel() * self.run

    def window(self) -> int | None:
        """Start of the one run, where reading it costs no device synchronisation."""
        return int(self.starts) if self.starts.numel() == 1 and self.starts.device.type == "cpu" else None

    def blocks(self, units: int) -> Tensor | None:
        """Indices of the kept blocks, where the runs tile the axis."""
        if self.starts.numel() == 1 or units % self.run:
            return None
        return self.starts if self.run == 1 else self.starts // self.run

    def units(self, units: int) -> Tensor:
        """Kept positions [width]."""
        if self.run == 1:
            return self.starts
        positions = (self.starts[:, None] + torch.arange(self.run, device=self.starts.device)).view(-1)
        return positions if self.blocks(units) is not None else positions % units


def runs(starts: Tensor | None, run: int) -> Runs | None:
    """The runs that an op's flat arguments stand for; None where the axis is dense."""
    return None if starts is None else Runs(starts, run)


def take(x: Tensor, dim: int, kept: Runs) -> Tensor:
    """Compact copy (for a window that does not wrap: a view) of the kept units of axis `dim`."""
    units = x.size(dim)
    start = kept.window()
    if start is not None:
        if start + kept.run <= units:
            return x.narrow(dim, start, kept.run)
        tail = units - start
        return torch.cat([x.narrow(dim, start, tail), x.narrow(dim, 0, kept.run - tail)], dim)
    blocks = kept.blocks(units)
    if blocks is None or kept.run == 1:
        return x.index_select(dim, kept.units(units))
    dim %= x.dim()
    return x.unflatten(dim, (-1, kept.run)).index_select(dim, blocks).flatten(dim, dim + 1)


def put(y: Tensor, dim: int, kept: Runs, units: int) -> Tensor:
    """Dense tensor with the kept units of axis `dim` from y, zeros elsewhere: the adjoint of `take`."""
    dim %= y.dim()
    start = kept.window()
    if start is not None:
        return _put_window(y, dim, start, units)
    blocks = kept.blocks(units)
    if blocks is None:
        # padding of a ragged block wraps onto kept units, where it must add its zeros and not overwrite
        return y.new_zeros(_resized(y, dim, units)).index_add(dim, kept.units(units), y)
    if kept.run == 1:
        return y.new_zeros(_resized(y, dim, units)).index_copy(dim, blocks, y)
    tiled = y.unflatten(dim, (-1, kept.run))
    dense = tiled.new_zeros(_resized(tiled, dim, units // kept.run))
    return dense.index_copy(dim, blocks, tiled).flatten(dim, dim + 1)


def _put_window(y: Tensor, dim: int, start: int, units: int) -> Tensor:
    kept = y.size(dim)
    if start + kept <= units:
        before = y.new_zeros(_resized(y, dim, start))
        after = y.new_zeros(_resized(y, dim, units - start - kept))
        return torch.cat([before, y, after], dim)
    tail = units - start
    dropped = y.new_zeros(_resized(y, dim, units - kept))
    return torch.cat([y.narrow(dim, tail, kept - tail), dropped, y.narrow(dim, 0, tail)], dim)


def _resized(x: Tensor, dim: int, size: int) -> list[int]:
    return [size if d == dim else s for d, s in enumerate(x.shape)]


def tile_index(rows: Runs | None, cols: Runs | None, shape: tuple[int, int]) -> tuple[Tensor, int] | None:
    """Flat index of the kept tiles of a contiguous [N, K] weight seen as [N * K/b, b], with b.

    None where the columns have no runs worth copying whole.
    """
    n, k = shape
    device = (rows or cols).starts.device  # type: ignore[union-attr]
    row_units = torch.arange(n, device=device) if rows is None else rows.units(n)
    if cols is None:
        return (row_units, k) if rows is None or rows.blocks(n) is not None else None
    blocks = cols.blocks(k)
    if blocks is None or cols.run < MIN_RUN or (rows is not None and rows.blocks(n) is None):
        return None
    return (row_units[:, None] * (k // cols.run) + blocks).view(-1), cols.run


def take_weight(weight: Tensor, rows: Runs | None, cols: Runs | None) -> Tensor:
    """W [N, K] -> W[rows][:, cols] [N', K']."""
    if rows is None and cols is None:
        return weight
    tiles = tile_index(rows, cols, (weight.size(0), weight.size(1))) if weight.is_contiguous() else None
    if tiles is None:
        out = weight if rows is None else take(weight, 0, rows)
        return out if cols is None else take(out, 1, cols)
    index, width = tiles
    height = weight.size(0) if rows is None else rows.width
    return weight.view(-1, width).index_select(0, index).view(height, -1)


def put_weight(grad: Tensor, rows: Runs | None, cols: Runs | None, shape: tuple[int, int]) -> Tensor:
    """G [N', K'] -> dense [N, K] with exact zeros at the dropped rows and columns."""
    out = grad if cols is None else put(grad, 1, cols, shape[1])
    return out if rows is None else put(out, 0, rows, shape[0])
