"""Groups of rows with a draw each: starts [groups, count] in place of [count].

A site's tensor [leading, ..., units] is cut along its leading axis in `groups` contiguous chunks of equal size, the
first ones one longer where that does not come out even. Any value of its region has leading * m rows in the same
order, so chunks are chunks of rows there too.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropfx.ops.runs import Runs, gather, scatter


class KeptAxis(NamedTuple):
    """An axis of an op: flat arguments starts (None: dense), run, leading (used with groups only)."""

    starts: Tensor | None
    run: int
    leading: int

    @property
    def grouped(self) -> bool:
        """Whether each group of rows keeps units of its own: starts are [groups, count]."""
        return self.starts is not None and self.starts.dim() == 2

    def ends(self, rows: int) -> list[int]:
        """Row at which each group ends."""
        assert self.starts is not None
        each, rest = divmod(rows, self.leading) if self.leading else (0, rows)
        if rest:
            raise RuntimeError(f"groups: {rows} rows do not follow a leading axis of {self.leading}; use groups=1 here")
        return list(accumulate(size * each for size in _sizes(self.leading, len(self.starts))))

    def runs(self, rows: int, row: int) -> Runs | None:
        """The runs kept in a row."""
        if self.starts is None:
            return None
        if not self.grouped:
            return Runs(self.starts, self.run)
        group = next((g for g, end in enumerate(self.ends(rows)) if row < end), 0)
        return Runs(self.starts[group], self.run)


class Piece(NamedTuple):
    """Rows low..high, in which every axis keeps the same units."""

    low: int
    high: int
    runs: list[Runs | None]


def _sizes(leading: int, groups: int) -> list[int]:
    """Leading positions of each group, as `torch.tensor_split` does it."""
    size, more = divmod(leading, groups)
    return [size + (group < more) for group in range(groups)]


def by_row(values: Tensor, leading: int) -> Tensor:
    """values [groups, *] of each leading position, [leading, *]; without a Python number, for compilers."""
    size, more = leading // len(values), leading % len(values)
    row = torch.arange(leading, device=values.device)
    longer = more * (size + 1)
    group = torch.where(row < longer, row // (size + 1), more + (row - longer) // torch.sym_max(size, 1))
    return values.index_select(0, group)


def pieces(rows: int, *axes: KeptAxis) -> list[Piece]:
    """Cut `rows` rows where the group of any axis changes."""
    ends = sorted({rows}.union(*(axis.ends(rows) for axis in axes if axis.grouped)) - {0}) or [0]
    return [
        Piece(low, high, [axis.runs(rows, low) for axis in axes]) for low, high in zip([0, *ends], ends, strict=False)
    ]


def gather_groups(x: Tensor, dim: int, kept: KeptAxis) -> Tensor:
    """`runs.take`, each row by the draw of its group."""
    if not kept.grouped:
        return gather(x, dim, _shared(kept))
    return _by_group(x, dim, kept, lambda part, runs: gather(part, 1, runs))


def scatter_groups(y: Tensor, dim: int, kept: KeptAxis, units: int) -> Tensor:
    """`runs.put`, each row by the draw of its group."""
    if not kept.grouped:
        return scatter(y, dim, _shared(kept), units)
    return _by_group(y, dim, kept, lambda part, runs: scatter(part, 1, runs, units))


def _by_group(x: Tensor, dim: int, kept: KeptAxis, move: Callable[[Tensor, Any], Tensor]) -> Tensor:
    dim %= x.dim()
    flat = x.reshape(prod(x.shape[:dim]), *x.shape[dim:])
    moved = torch.cat([move(flat[p.low : p.high], p.runs[0]) for p in pieces(len(flat), kept)])
    return moved.view(*x.shape[:dim], *moved.shape[1:])


def _shared(kept: KeptAxis) -> Runs:
    assert kept.starts is not None
    return Runs(kept.starts, kept.run)
