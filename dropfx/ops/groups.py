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


def gather_groups(x: Tensor, dim: int, kept: Kept) -> Tensor:
    """`runs.gather`, each row by the draw of its group."""
    if not kept.grouped:
        return gather(x, dim, kept)
    return _by_group(x, dim, kept, lambda part, own: gather(part, 1, own))


def scatter_groups(y: Tensor, dim: int, kept: Kept, units: int) -> Tensor:
    """`runs.scatter`, each row by the draw of its group."""
    if not kept.grouped:
        return scatter(y, dim, kept, units)
    return _by_group(y, dim, kept, lambda part, own: scatter(part, 1, own, units))


def _by_group(x: Tensor, dim: int, kept: Kept, move: Callable[[Tensor, Any], Tensor]) -> Tensor:
    dim %= x.dim()
    flat = x.reshape(prod(x.shape[:dim]), *x.shape[dim:])
    moved = torch.cat([move(flat[p.low : p.high], p.kept[0]) for p in pieces(len(flat), kept)])
    return moved.view(*x.shape[:dim], *moved.shape[1:])
