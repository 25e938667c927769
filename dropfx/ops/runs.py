"""Moving the kept runs of an axis: the reference data movement that every gathered op is made of.

Whole runs are copied, never single elements, where the axis divides into runs; a single run (a window) is a view.
All functions are out of place and differentiable, so double backward through them works.

Legend: N, K dense sizes of a weight's rows and columns; N', K' compact ones; b units in a run.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from dropfx.ops.kept import Kept

MIN_RUN = 8
"""Shortest run that is worth copying as a row of its own; below it two element-wise stages are faster."""


def gather(x: Tensor, dim: int, kept: Kept) -> Tensor:
    """Compact copy (for a window that does not wrap: a view) of the kept units of axis `dim`."""
    units = x.size(dim)
    start = kept.window()
    if start is not None:
        if start + kept.run <= units:
            return x.narrow(dim, start, kept.run)
        tail = units - start
        return torch.cat([x.narrow(dim, start, tail), x.narrow(dim, 0, kept.run - tail)], dim)
    if not kept.whole_runs(units) or kept.run == 1:
        return x.index_select(dim, kept.units(units))
    dim %= x.dim()
    tiled: Tensor = x.unflatten(dim, (-1, kept.run))
    return tiled.index_select(dim, kept.blocks()).flatten(dim, dim + 1)


def scatter(y: Tensor, dim: int, kept: Kept, units: int) -> Tensor:
    """Dense tensor with the kept units of axis `dim` from y, zeros elsewhere: the adjoint of `gather`."""
    dim %= y.dim()
    start = kept.window()
    if start is not None:
        return _scatter_window(y, dim, start, units)
    if not kept.whole_runs(units):
        # padding of a ragged block wraps onto kept units, where it must add its zeros and not overwrite
        return y.new_zeros(_resized(y, dim, units)).index_add_(dim, kept.units(units), y)
    if kept.run == 1:
        return y.new_zeros(_resized(y, dim, units)).index_copy_(dim, kept.starts, y)
    tiled: Tensor = y.unflatten(dim, (-1, kept.run))
    dense = tiled.new_zeros(_resized(tiled, dim, units // kept.run))
    return dense.index_copy_(dim, kept.blocks(), tiled).flatten(dim, dim + 1)


def _scatter_window(y: Tensor, dim: int, start: int, units: int) -> Tensor:
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


def stored_transposed(weight: Tensor) -> bool:
    """Whether a matrix is the transpose of what lies in memory."""
    return not weight.is_contiguous() and weight.t().is_contiguous()


class GatheredWeight:
    """The kept rows and columns of a weight [N, K]; None keeps all of an axis.

    A weight that is stored as [K, N] is `flipped`: whole runs lie in its transpose.
    """

    def __init__(self, weight: Tensor, rows: Kept | None, cols: Kept | None) -> None:
        self.rows, self.cols = rows, cols
        self.flipped = GatheredWeight(weight.t(), cols, rows) if stored_transposed(weight) else None
        self.n, self.k = weight.shape
        self.dtype = weight.dtype
        self.partial = rows is not None or cols is not None
        self.size = (self.n if rows is None else rows.width) * (self.k if cols is None else cols.width)

    @cached_property
    def block_index(self) -> tuple[Tensor, int] | None:
        """Flat index of the kept tiles in the weight seen as [N * K/b, b], with b; built once a draw.

        None where the axes have no runs worth copying whole.
        """
        rows, cols = self.rows, self.cols
        if not self.partial or (rows is not None and not rows.whole_runs(self.n)):
            return None
        if cols is None:
            return (rows.units(self.n), self.k) if rows is not None else None
        if cols.run < MIN_RUN or not cols.whole_runs(self.k):
            return None
        units = torch.arange(self.n, device=cols.starts.device) if rows is None else rows.units(self.n)
        return (units[:, None] * (self.k // cols.run) + cols.blocks()).view(-1), cols.run

    def row_blocks(self) -> list[int] | None:
        """Starts of the kept blocks of rows, where whole rows are kept and asking is free."""
        rows = self.rows
        if rows is None or self.cols is not None or rows.starts.device.type != "cpu" or rows.run < MIN_RUN:
            return None
        return rows.starts.tolist() if rows.whole_runs(self.n) else None

    def gather(self, weight: Tensor) -> Tensor:
        """W [N, K] -> W[rows][:, cols] [N', K']; a view where the runs are windows that do not wrap."""
        if self.flipped is not None:
            return self.flipped.gather(weight.t()).t()
        tiles = self.block_index if weight.is_contiguous() else None
        if tiles is None:
            out = weight if self.rows is None else gather(weight, 0, self.rows)
            return out if self.cols is None else gather(out, 1, self.cols)
        index, width = tiles
        height = self.n if self.rows is None else self.rows.width
        return weight.view(-1, width).index_select(0, index).view(height, -1)

    def scatter(self, grad: Tensor) -> Tensor:
        """G [N', K'] -> [N, K] with exact zeros at the dropped rows and columns."""
        if self.flipped is not None:
            return self.flipped.scatter(grad.t()).t()
        out = grad if self.cols is None else scatter(grad, 1, self.cols, self.k)
        return out if self.rows is None else scatter(out, 0, self.rows, self.n)

    def add(self, dense: Tensor, grad: Tensor) -> Tensor:
        """dense [N, K] += scatter(grad), in place; windows are added to where they lie."""
        rows = _window_parts(self.rows, self.n)
        cols = _window_parts(self.cols, self.k)
        if rows is None or cols is None:
            return dense.add_(self.scatter(grad))
        for here, there, height in rows:
            for left, at, width in cols:
                dense[there : there + height, at : at + width] += grad[here : here + height, left : left + width]
        return dense


def _window_parts(kept: Kept | None, units: int) -> list[tuple[int, int, int]] | None:
    """(compact, dense, length) of a window that may wrap, or of a dense axis; None for runs."""
    if kept is None:
        return [(0, 0, units)]
    start = kept.window()
    if start is None:
        return None
    head = min(kept.run, units - start)
    return [(0, start, head), *([(head, 0, kept.run - head)] if head < kept.run else [])]
