"""dW [rows, cols] = scale * dy^T [N', M] @ x [M, K'], exact zeros elsewhere; db [rows] = sum over M of dy.

One pass writes all of dW. Without groups the tiles lie over the units in the order (kept, dropped): whole tiles of
dropped units skip the product and store zeros, and no tile mixes more than at one seam. With groups a unit is dropped
in some chunks of rows only, so tiles lie over the units themselves and skip the groups that keep nothing of them.

Legend: M rows of the batch; N x K the weight, N' and K' its kept rows and columns.
Limits: 2 * N' * K' * M operations, and N * K items to store, which bounds it for batches of less than some 200 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dropfx.kernels.addressing import aligned, group_rows, looked_up, swizzled
from dropfx.kernels.axes import Axis, alignment
from dropfx.kernels.configs import Small, config_for
from dropfx.kernels.launch import on_its_device
from dropfx.kernels.tables import inverse, order


@triton.jit
def _rank_update(
    acc,
    dy,
    x,
    n,  # position of each row of the tile
    some_n,  # whether it is one
    k,
    some_k,
    low,
    high,
    dy_row,
    dy_unit,
    x_row,
    x_unit,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """acc [n, k] + dy[low:high, n]^T @ x[low:high, k]"""
    dy_units = dy + n.to(tl.int64)[:, None] * dy_unit
    x_units = x + k.to(tl.int64)[None, :] * x_unit
    for first in range(low, high, BLOCK_M):
        m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        left = tl.load(dy_units + m[None, :] * dy_row, mask=some_n[:, None] & (m < high)[None, :], other=0)
        right = tl.load(x_units + m[:, None] * x_row, mask=(m < high)[:, None] & some_k[None, :], other=0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows", "kept_n", "kept_k", "units_n", "units_k"])
def _shared(
    dy,  # [M, N']
    x,  # [M, K']
    dw,  # [N, K], contiguous
    order_n,  # int32 [N]: units in the order (kept, dropped)
    order_k,
    rows,
    kept_n,
    kept_k,
    units_n,
    units_k,
    dy_row,
    dy_unit,
    x_row,
    x_unit,
    scale,
    ORDERED_N: tl.constexpr,
    ORDERED_K: tl.constexpr,
    N_CHUNK: tl.constexpr,
    K_CHUNK: tl.constexpr,
    N_ALIGNMENT: tl.constexpr,
    K_ALIGNMENT: tl.constexpr,
    UNITS_ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    kept_n, kept_k, units_k = (
        aligned(kept_n, N_ALIGNMENT),
        aligned(kept_k, K_ALIGNMENT),
        aligned(units_k, UNITS_ALIGNMENT),
    )
    tile_n, tile_k = swizzled(tl.program_id(0), tl.cdiv(units_n, BLOCK_N), tl.cdiv(units_k, BLOCK_K), 8)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    some = (tile_n * BLOCK_N < kept_n) & (tile_k * BLOCK_K < kept_k)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc = _rank_update(
        acc,
        dy,
        x,
        n,
        n < kept_n,
        k,
        k < kept_k,
        0,
        tl.where(some, rows, 0),
        dy_row,
        dy_unit,
        x_row,
        x_unit,
        PRECISION,
        UPCAST,
        BLOCK_M,
    )
    unit_n, unit_k = n, k
    if ORDERED_N:
        unit_n, _ = looked_up(order_n, n, n < units_n, N_CHUNK)
    if ORDERED_K:
        unit_k, _ = looked_up(order_k, k, k < units_k, K_CHUNK)
    place = dw + unit_n.to(tl.int64)[:, None] * units_k + unit_k[None, :]
    tl.store(place, (acc * scale).to(dw.dtype.element_ty), mask=(n < units_n)[:, None] & (k < units_k)[None, :])


@triton.jit(do_not_specialize=["rows", "units_n", "units_k", "leading", "groups"])
def _grouped(
    dy,  # [M, N']
    x,  # [M, K']
    dw,  # [N, K], contiguous
    inverse_n,  # int32 [groups, N]: position of a unit, -1 where it is dropped
    inverse_k,
    rows,
    units_n,
    units_k,
    leading,
    groups,
    inverse_n_group,
    inverse_k_group,
    dy_row,
    dy_unit,
    x_row,
    x_unit,
    scale,
    GATHERED_N: tl.constexpr,
    GATHERED_K: tl.constexpr,
    N_CHUNK: tl.constexpr,
    K_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    units_n, units_k = aligned(units_n, N_CHUNK), aligned(units_k, K_CHUNK)
    tile_n, tile_k = swizzled(tl.program_id(0), tl.cdiv(units_n, BLOCK_N), tl.cdiv(units_k, BLOCK_K), 8)
    unit_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    unit_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for group in range(groups):
        n, some_n = unit_n, unit_n < units_n
        k, some_k = unit_k, unit_k < units_k
        if GATHERED_N:
            n, some_n = looked_up(inverse_n + group * inverse_n_group, unit_n, unit_n < units_n, N_CHUNK)
        if GATHERED_K:
            k, some_k = looked_up(inverse_k + group * inverse_k_group, unit_k, unit_k < units_k, K_CHUNK)
        low, high = group_rows(group, rows, leading, groups)
        if GATHERED_N:
            high = tl.where(tl.max(some_n.to(tl.int32), 0) > 0, high, low)
        if GATHERED_K:
            high = tl.where(tl.max(some_k.to(tl.int32), 0) > 0, high, low)
        acc = _rank_update(
            acc, dy, x, n, some_n, k, some_k, low, high, dy_row, dy_unit, x_row, x_unit, PRECISION, UPCAST, BLOCK_M
        )
    place = dw + unit_n.to(tl.int64)[:, None] * units_k + unit_k[None, :]
    inside = (unit_n < units_n)[:, None] & (unit_k < units_k)[None, :]
    tl.store(place, (acc * scale).to(dw.dtype.element_ty), mask=inside)


@on_its_device
def weight_gradient(dy: Tensor, x: Tensor, rows: Axis, cols: Axis, scale: float = 1.0, leading: int = 1) -> Tensor:
    """scale * dy^T @ x at the kept rows and columns of the weight, exact zeros elsewhere.

    Args:
        dy: [M, rows.width], any strides.
        x: [M, cols.width], any strides, of dy's dtype.
        leading: length of the leading axis that groups divide; divides M.

    Returns: [rows.units, cols.units], contiguous. Ragged blocks are not served: their padding would have to be added.
    """
    assert not rows.ragged
    assert not cols.ragged
    dw = dy.new_empty(rows.units, cols.units)
    if not dw.numel():
        return dw
    groups = max(rows.groups, cols.groups)
    product = "weight gradient" if groups == 1 else "weight gradient of groups"
    small: Small = None if groups == 1 else "first"
    config = config_for(product, rows.units, cols.units, len(dy), dy.dtype, small)
    grid = (triton.cdiv(rows.units, config.m) * triton.cdiv(cols.units, config.n),)
    compiled = {"N_CHUNK": rows.chunk, "K_CHUNK": cols.chunk, **config.options(dy.dtype, "NKM")}
    if groups == 1:
        orders = (order(axis) if axis.starts is not None else dw for axis in (rows, cols))
        _shared[grid](
            *(dy, x, dw, *orders, len(dy), rows.width, cols.width, rows.units, cols.units),
            *(*dy.stride(), *x.stride(), scale),
            ORDERED_N=rows.starts is not None,
            ORDERED_K=cols.starts is not None,
            N_ALIGNMENT=rows.alignment,
            K_ALIGNMENT=cols.alignment,
            UNITS_ALIGNMENT=alignment(cols.units),
            **compiled,
        )
        return dw
    inverses = [inverse(axis) if axis.starts is not None else dw for axis in (rows, cols)]
    steps = (axis.units if axis.groups > 1 else 0 for axis in (rows, cols))
    _grouped[grid](
        *(dy, x, dw, *inverses, len(dy), rows.units, cols.units, leading, groups, *steps),
        *(*dy.stride(), *x.stride(), scale),
        GATHERED_N=rows.starts is not None,
        GATHERED_K=cols.starts is not None,
        **compiled,
    )
    return dw


@triton.jit(do_not_specialize=["rows", "units", "leading", "groups"])
def _bias(
    dy,  # [M, N']
    db,  # [N]
    inverse,  # int32 [groups, N]
    rows,
    units,
    leading,
    groups,
    inverse_group,
    dy_row,
    dy_unit,
    GATHERED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    units = aligned(units, CHUNK)
    unit = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for group in range(groups):
        n, some = unit, unit < units
        if GATHERED:
            n, some = looked_up(inverse + group * inverse_group, unit, unit < units, CHUNK)
        low, high = group_rows(group, rows, leading, groups)
        columns = dy + n.to(tl.int64)[None, :] * dy_unit
        for first in range(low, high, BLOCK_M):
            m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
            part = tl.load(columns + m[:, None] * dy_row, mask=(m < high)[:, None] & some[None, :], other=0)
            acc += tl.sum(part.to(tl.float32), 0)
    tl.store(db + unit, acc.to(db.dtype.element_ty), mask=unit < units)


@on_its_device
def bias_gradient(dy: Tensor, rows: Axis, leading: int = 1) -> Tensor:
    """Sum over the batch of dy [M, rows.width] at the kept units, zeros elsewhere: [rows.units]."""
    assert not rows.ragged
    db = dy.new_empty(rows.units)
    if rows.units:
        config = config_for("bias gradient", rows.units, 1, len(dy), dy.dtype, small="only")
        _bias[(triton.cdiv(rows.units, config.n),)](
            *(dy, db, db if rows.starts is None else inverse(rows), len(dy), rows.units, leading, rows.groups),
            *(rows.units if rows.groups > 1 else 0, *dy.stride()),
            GATHERED=rows.starts is not None,
            CHUNK=rows.chunk,
            BLOCK_N=config.n,
            BLOCK_M=config.r,
        )
    return db
