"""Groups of rows with a draw each: starts [groups, count] in place of [count].

A site's tensor [leading, ..., units] is cut along its leading axis in `groups` contiguous chunks of equal size, the
first ones one longer where that does not come out even. Any value of its region has leading * m rows in the same
order, so chunks are chunks of rows there too.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropfx.ops.kept import Kept
from dropfx.ops.runs import gather, scatter


class Piece(NamedTuple):
    """Rows low..high, in which every axis keeps the same units."""

    low: int
    high: int
    kept: list[Kept | None]


def by_row(values: Tensor, leading: int) -> Tensor:
    """values [groups, *] of each leading position, [leading, *]; without a Python number, for compilers."""
    size, more = leading // len(values), leading % len(values)
    row = torch.arange(leading, device=values.device)
    longer = more * (size + 1)
    group = torch.where(row < longer, row // (size + 1), more + (row - longer) // torch.sym_max(size, 1))
    return values.index_select(0, group)


def pieces(rows: int, *axes: Kept | None) -> list[Piece]:
    """Cut `rows` rows where the group of any axis changes."""
    ends = sorted({rows}.union(*(axis.ends(rows) for axis in axes if axis is not None and axis.grouped)) - {0}) or [0]
    return [
        Piece(low, high, [None if axis is None else axis.of_row(rows, low) for axis in axes])
        for low, high in zip([0, *ends], ends, strict=False)
    ]


def tiles_by_row(kept: Kept, rows: int, units: int, row: Tensor | None = None) -> Tensor:
    """Places [rows * count] of the runs that each row keeps, in values [*, units] seen as [* * units/run, run].

    Args:
        kept: of groups or of all rows; the axis divides into its runs.
        row: int64 [rows], where a row lies; in order where it is not given.
    """
    blocks = kept.blocks()
    if kept.grouped:
        kept.ends(rows)  # raises where rows cannot be divided
        blocks = by_row(blocks, kept.leading)[:, None].expand(-1, rows // max(kept.leading, 1), -1).flatten(0, 1)
    row = torch.arange(rows, device=blocks.device) if row is None else row
    return (row[:, None] * (units // kept.run) + blocks).view(-1)


def gather_groups(x: Tensor, dim: int, kept: Kept) -> Tensor:
    """`runs.gather`, each row by the draw of its group."""
    if not kept.grouped:
        return gather(x, dim, kept)
    dim %= x.dim()
    units, behind = x.size(dim), x.shape[dim + 1 :]
    if not kept.whole_runs(units):
        return _by_group(x, dim, kept, lambda part, own: gather(part, 1, own))
    tiles = tiles_by_row(kept, prod(x.shape[:dim]), units)
    found = x.reshape(-1, kept.run, *behind).index_select(0, tiles)
    return found.view(*x.shape[:dim], kept.width, *behind)


def scatter_groups(y: Tensor, dim: int, kept: Kept, units: int) -> Tensor:
    """`runs.scatter`, each row by the draw of its group."""
    if not kept.grouped:
        return scatter(y, dim, kept, units)
    dim %= y.dim()
    rows, behind = prod(y.shape[:dim]), y.shape[dim + 1 :]
    if not kept.whole_runs(units):
        return _by_group(y, dim, kept, lambda part, own: scatter(part, 1, own, units))
    dense = y.new_zeros(rows * units // kept.run, kept.run, *behind)
    dense = dense.index_copy_(0, tiles_by_row(kept, rows, units), y.reshape(-1, kept.run, *behind))
    return dense.view(*y.shape[:dim], units, *behind)


def _by_group(x: Tensor, dim: int, kept: Kept, move: Callable[[Tensor, Any], Tensor]) -> Tensor:
    flat = x.reshape(prod(x.shape[:dim]), *x.shape[dim:])
    moved = torch.cat([move(flat[p.low : p.high], p.kept[0]) for p in pieces(len(flat), kept)])
    return moved.view(*x.shape[:dim], *moved.shape[1:])
