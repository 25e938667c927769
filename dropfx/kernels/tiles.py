"""Products with W * M, where M keeps the tiles (r, c) of W with (r + c - offset) mod period = 0.

    forward         y  [M, N] = scale * x [M, K] @ (W * M)^T + b
    input gradient  dx [M, K] = scale * dy [M, N] @ (W * M)
    weight          dW [N, K] = scale * dy^T @ x at kept tiles, exact zeros elsewhere

Tiles of one axis whose number is equal modulo the period are a class. Class s of the output axis meets class
(offset - s) mod period of the other one and nothing else, so a program stays in one class and sums over one in
`period`; where the units of a class lie is arithmetic, no table is read.

Legend: M rows of the batch; N x K the weight, cut in tiles of T_N x T_K, smaller ones at the edges.
Limits: those of a product with 1 / period of the operations; short tiles (less than 32 half-precision units) also cost
bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dropfx.kernels.addressing import aligned
from dropfx.kernels.axes import alignment
from dropfx.kernels.configs import config_for
from dropfx.kernels.launch import on_its_device


@triton.jit
def _unit_of(position, number, period, TILE: tl.constexpr):
    """The unit at a position of class `number`: its tiles are number, number + period, ..."""
    return (number + position // TILE * period) * TILE + position % TILE


@triton.jit
def _class_width(number, units, period, TILE: tl.constexpr):
    """Positions of a class, whole tiles: those past the axis' end are masked by their unit."""
    tiles = tl.cdiv(units, TILE)
    return tl.cdiv(tl.maximum(tiles - number, 0), period) * TILE


@triton.jit
def _partner(number, period, offset):
    """The class of the other axis that class `number` meets."""
    return (offset - number + period) % period


@triton.jit(do_not_specialize=["rows", "outs", "sums", "period", "offset", "tiles_a_class"])
def _matmul(
    a,  # [M, sums]
    w,  # [outs, sums] by strides
    bias,  # [outs]
    out,  # [M, outs], contiguous
    rows,
    outs,
    sums,
    period,
    offset,
    tiles_a_class,
    a_row,
    a_sum,
    w_out,
    w_sum,
    scale,
    TILE_O: tl.constexpr,
    TILE_R: tl.constexpr,
    OUT_ALIGNMENT: tl.constexpr,
    SUM_ALIGNMENT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    outs, sums = aligned(outs, OUT_ALIGNMENT), aligned(sums, SUM_ALIGNMENT)
    program = tl.program_id(0) % (period * tiles_a_class)
    number = program // tiles_a_class
    o = _unit_of((program % tiles_a_class) * BLOCK_O + tl.arange(0, BLOCK_O), number, period, TILE_O)
    m = tl.program_id(0) // (period * tiles_a_class) * BLOCK_M + tl.arange(0, BLOCK_M)
    other = _partner(number, period, offset)
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    a_rows = a + m.to(tl.int64)[:, None] * a_row
    w_outs = w + o.to(tl.int64)[None, :] * w_out
    for first in range(0, _class_width(other, sums, period, TILE_R), BLOCK_R):
        r = _unit_of(first + tl.arange(0, BLOCK_R), other, period, TILE_R)
        place = r.to(tl.int64)
        left = tl.load(a_rows + place[None, :] * a_sum, mask=(m < rows)[:, None] & (r < sums)[None, :], other=0)
        right = tl.load(w_outs + place[:, None] * w_sum, mask=(r < sums)[:, None] & (o < outs)[None, :], other=0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    acc *= scale
    if BIAS:
        acc += tl.load(bias + o, mask=o < outs, other=0).to(tl.float32)[None, :]
    inside = (m < rows)[:, None] & (o < outs)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * outs + o[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "n_units", "k_units", "period", "offset", "n_tiles", "k_tiles"])
def _weight_gradient(
    dy,  # [M, N]
    x,  # [M, K]
    dw,  # [N, K], contiguous
    rows,
    n_units,
    k_units,
    period,
    offset,
    n_tiles,
    k_tiles,
    dy_row,
    dy_unit,
    x_row,
    x_unit,
    scale,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    N_ALIGNMENT: tl.constexpr,
    K_ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    n_units, k_units = aligned(n_units, N_ALIGNMENT), aligned(k_units, K_ALIGNMENT)
    row, column = tl.program_id(0) % (period * n_tiles), tl.program_id(0) // (period * n_tiles)
    n_class, k_class = row // n_tiles, column // k_tiles
    n = _unit_of((row % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N), n_class, period, TILE_N)
    k = _unit_of((column % k_tiles) * BLOCK_K + tl.arange(0, BLOCK_K), k_class, period, TILE_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dy_units = dy + n.to(tl.int64)[:, None] * dy_unit
    x_units = x + k.to(tl.int64)[None, :] * x_unit
    for first in range(0, tl.where(_partner(n_class, period, offset) == k_class, rows, 0), BLOCK_M):
        m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        left = tl.load(dy_units + m[None, :] * dy_row, mask=(n < n_units)[:, None] & (m < rows)[None, :], other=0)
        right = tl.load(x_units + m[:, None] * x_row, mask=(m < rows)[:, None] & (k < k_units)[None, :], other=0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    inside = (n < n_units)[:, None] & (k < k_units)[None, :]
    place = dw + n.to(tl.int64)[:, None] * k_units + k[None, :]
    tl.store(place, (acc * scale).to(dw.dtype.element_ty), mask=inside)


def _positions(units: int, tile: int, period: int) -> int:
    """Positions of the widest class."""
    return int(triton.cdiv(triton.cdiv(units, tile), period)) * tile


@on_its_device
def tiled_matmul(
    a: Tensor,
    weight: Tensor,
    tile: tuple[int, int],
    period: int,
    offset: int,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """scale * a @ (weight * M)^T + bias; the input gradient is that of `weight.t()` with the tile's sides swapped.

    Args:
        a: [M, K], any strides.
        weight: [N, K], any strides, of a's dtype (float32, float16, bfloat16).
        tile: rows and columns of a tile.
        period, offset: the tiles (r, c) with (r + c - offset) mod period = 0 are kept.

    Returns: [M, N], contiguous.
    """
    out = a.new_empty(a.size(0), weight.size(0))
    if not out.numel():
        return out
    config = config_for("tiled matmul", a.size(0), weight.size(0), weight.size(1), a.dtype)
    blocks = triton.cdiv(_positions(weight.size(0), tile[0], period), config.n)
    # one number of programs: others than the first are limited to 65,535
    _matmul[(period * blocks * triton.cdiv(a.size(0), config.m),)](
        *(a, weight, a if bias is None else bias, out, a.size(0), *weight.shape, period, offset % period, blocks),
        *(*a.stride(), *weight.stride(), scale),
        TILE_O=tile[0],
        TILE_R=tile[1],
        OUT_ALIGNMENT=alignment(weight.size(0)),
        SUM_ALIGNMENT=alignment(weight.size(1)),
        BIAS=bias is not None,
        **config.options(a.dtype, "MOR"),
    )
    return out


@on_its_device
def tiled_weight_gradient(
    dy: Tensor, x: Tensor, tile: tuple[int, int], period: int, offset: int, scale: float = 1.0
) -> Tensor:
    """scale * dy^T [N, M] @ x [M, K] at the kept tiles, exact zeros elsewhere: [N, K], contiguous."""
    dw = dy.new_empty(dy.size(1), x.size(1))
    if not dw.numel():
        return dw
    config = config_for("tiled weight gradient", dw.size(0), dw.size(1), len(dy), dy.dtype)
    n_tiles = triton.cdiv(_positions(dy.size(1), tile[0], period), config.m)
    k_tiles = triton.cdiv(_positions(x.size(1), tile[1], period), config.n)
    _weight_gradient[(period * n_tiles * period * k_tiles,)](
        *(dy, x, dw, len(dy), *dw.shape, period, offset % period, n_tiles, k_tiles),
        *(*dy.stride(), *x.stride(), scale),
        TILE_N=tile[0],
        TILE_K=tile[1],
        N_ALIGNMENT=alignment(dw.size(0)),
        K_ALIGNMENT=alignment(dw.size(1)),
        **config.options(dy.dtype, "NKM"),
    )
    return dw
