"""Products with a weight whose kept rows and columns are gathered inside of the loop.

    forward         y  [M, N'] = act(scale * x [M, K'] @ W[rows, cols]^T + b[rows])
    input gradient  dx [M, K'] = scale * dy [M, N'] @ W[rows, cols]

Both are one kernel: A [M, R] times the weight, read along its output axis O and the axis R that is summed over.
Legend: M rows of the batch; N x K the weight, N' and K' its kept rows and columns. With groups the batch is cut in
contiguous chunks of rows, each with kept units of its own, and no tile has rows of two.

Limits: those of the compact product. A tile m x o reads (m + o) * R items for 2 * m * o * R operations; 64 kept units
in half precision are one 128-byte line, so that from runs of 64 on gathering costs no bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dropfx.kernels.addressing import aligned, group_rows, swizzled, units_at
from dropfx.kernels.axes import Axis, largest_group
from dropfx.kernels.configs import config_for
from dropfx.kernels.epilogue import activated
from dropfx.kernels.launch import on_its_device

_VARYING = ["rows", "outs", "sums", "out_units", "sum_units", "leading", "groups", "tiles_a_group"]


# sizes that vary from step to step (`row`, ragged batches) must not compile the kernel anew
@triton.jit(do_not_specialize=_VARYING)
def _matmul(
    a,  # [M, R]
    w,  # [O units, R units] by strides
    bias,  # [O units]
    out,  # [M, O], contiguous
    out_starts,
    sum_starts,
    rows,
    outs,
    sums,
    out_units,
    sum_units,
    leading,
    groups,
    tiles_a_group,
    a_row,
    a_sum,
    w_out,
    w_sum,
    out_group,
    sum_group,
    scale,
    OUT_RUN: tl.constexpr,
    SUM_RUN: tl.constexpr,
    OUT_WRAPS: tl.constexpr,
    SUM_WRAPS: tl.constexpr,
    OUT_CHUNK: tl.constexpr,
    SUM_CHUNK: tl.constexpr,
    OUT_ALIGNMENT: tl.constexpr,
    SUM_ALIGNMENT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    outs, sums = aligned(outs, OUT_ALIGNMENT), aligned(sums, SUM_ALIGNMENT)
    tile_m, tile_o = swizzled(tl.program_id(0), groups * tiles_a_group, tl.cdiv(outs, BLOCK_O), 8)
    group = tile_m // tiles_a_group
    low, high = group_rows(group, rows, leading, groups)
    m = low + (tile_m % tiles_a_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    out_starts += group * out_group
    sum_starts += group * sum_group
    out_unit = units_at(tile_o * BLOCK_O, outs, out_starts, out_units, OUT_RUN, OUT_WRAPS, OUT_CHUNK, BLOCK_O)
    a_rows = a + m.to(tl.int64)[:, None] * a_row
    w_outs = w + out_unit.to(tl.int64)[None, :] * w_out
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for first in range(0, sums, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        unit = units_at(first, sums, sum_starts, sum_units, SUM_RUN, SUM_WRAPS, SUM_CHUNK, BLOCK_R)
        within = (m < high)[:, None] & (r < sums)[None, :]
        left = tl.load(a_rows + r.to(tl.int64)[None, :] * a_sum, mask=within, other=0)
        inside = (r < sums)[:, None] & (o < outs)[None, :]
        right = tl.load(w_outs + unit.to(tl.int64)[:, None] * w_sum, mask=inside, other=0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    acc *= scale
    if BIAS:
        acc += tl.load(bias + out_unit, mask=o < outs, other=0).to(tl.float32)[None, :]
    acc = activated(acc, ACTIVATION)
    place = out + m.to(tl.int64)[:, None] * outs + o[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(m < high)[:, None] & (o < outs)[None, :])


@on_its_device
def gathered_matmul(
    a: Tensor,
    weight: Tensor,
    outs: Axis,
    sums: Axis,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    activation: str = "none",
    leading: int = 1,
) -> Tensor:
    """act(scale * a @ weight[outs, sums]^T + bias[outs]); the input gradient is that of `weight.t()`.

    Args:
        a: [M, sums.width], any strides.
        weight: [outs.units, sums.units], any strides, of a's dtype (float32, float16, bfloat16).
        outs, sums: kept units of the output's and the summed axis; groups, if any, are the same number.
        bias: [outs.units], contiguous.
        activation: one of `epilogue.ACTIVATIONS`.
        leading: length of the leading axis that groups divide; divides M.

    Returns: [M, outs.width], contiguous, a's dtype; sums are taken in float32.
    """
    rows, groups = a.size(0), max(outs.groups, sums.groups)
    out = a.new_empty(rows, outs.width)
    if not out.numel():
        return out
    # a pointer for each item of the weight fills the registers, where windows and single units leave no vectors
    single = min(outs.chunk, sums.chunk) * a.dtype.itemsize < 4
    product = "matmul by items" if single else "matmul"
    config = config_for(product, rows, outs.width, sums.width, a.dtype, small="only" if single else None)
    tiles = triton.cdiv(largest_group(rows, leading, groups), config.m)
    (out_starts, out_group), (sum_starts, sum_group) = outs.arguments(a), sums.arguments(a)
    _matmul[(groups * tiles * triton.cdiv(outs.width, config.n),)](
        *(a, weight, a if bias is None else bias, out, out_starts, sum_starts),
        *(rows, outs.width, sums.width, outs.units, sums.units, leading, groups, tiles),
        *(*a.stride(), *weight.stride(), out_group, sum_group, scale),
        OUT_RUN=outs.compiled_run,
        SUM_RUN=sums.compiled_run,
        OUT_WRAPS=outs.wraps,
        SUM_WRAPS=sums.wraps,
        OUT_CHUNK=outs.chunk,
        SUM_CHUNK=sums.chunk,
        OUT_ALIGNMENT=outs.alignment,
        SUM_ALIGNMENT=sums.alignment,
        BIAS=bias is not None,
        ACTIVATION=activation,
        **config.options(a.dtype, "MOR"),
    )
    return out
