"""y = scale * x @ (W * M)^T + b, where M keeps the tiles (r, c) of W with (r + c - offset) mod period = 0.

Rows of tiles with equal r mod period keep the same columns of tiles. So x's columns and y's rows are put in the order
of these classes once, and each class is one dense product of 1/period of the rows with 1/period of the columns.

Shapes: x [*, K], W [N, K], b [N], y [*, N], lattice int64 [2] on the CPU (period, offset)
    xs, ys, Ws: the parts of class s
    ys = scale * xs @ Ws^T      dxs = scale * dys @ Ws      dWs = scale * dys^T @ xs, zeros at dropped tiles
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dropfx.ops.define import EAGER, autocast, define, differentiable, first_derivative_only, padded, whole
from dropfx.ops.kept import Kept
from dropfx.ops.products import scaled_linear, scaled_mm
from dropfx.ops.runs import GatheredWeight, gather


class _Side(NamedTuple):
    """An axis of the weight in the order of its classes.

    Attributes:
        order: runs that bring the axis into the order of classes.
        back: runs that undo it.
        widths: units of each class.
    """

    order: Kept
    back: Kept
    widths: list[int]

    def classes(self) -> Iterator[tuple[int, int, Kept]]:
        """(begin, width, runs) of each class, in the order of classes."""
        begin = 0
        for width in self.widths:
            kept = self.order.starts[begin // self.order.run : (begin + width) // self.order.run]
            yield begin, width, Kept(kept, self.order.run)
            begin += width


def _side(units: int, tile: int, period: int, offset: int, sign: int, device: torch.device) -> _Side:
    # tiles at the edge may be smaller: runs are as long as divides both
    run = math.gcd(tile, units)
    starts = torch.arange(0, units, run, device=device)
    classes = (offset + sign * (starts // tile)) % period
    order = classes.argsort(stable=True)
    widths = (torch.bincount(classes, minlength=period) * run).tolist()
    return _Side(Kept(starts[order], run), Kept(order.argsort() * run, run), widths)


class _Tiles:
    """The kept tiles of a weight.

    Attributes:
        rows, cols: its axes in the order of classes.
        parts: rows and columns, in that order, and kept weight of each class that has both.
    """

    def __init__(self, weight: Tensor, tile: tuple[int, int], lattice: Tensor) -> None:
        period, offset = lattice.tolist()
        self.n, self.k = weight.shape
        self.dtype = weight.dtype
        self.rows = _side(self.n, tile[0], period, 0, 1, weight.device)
        self.cols = _side(self.k, tile[1], period, offset, -1, weight.device)
        self.parts: list[tuple[slice, slice, GatheredWeight]] = []
        for (top, height, rows), (left, width, cols) in zip(self.rows.classes(), self.cols.classes(), strict=True):
            if height and width:
                kept = GatheredWeight(weight, rows, cols)
                self.parts.append((slice(top, top + height), slice(left, left + width), kept))

    def gather(self, weight: Tensor) -> list[Tensor]:
        """The kept weight of each part."""
        return [kept.gather(weight) for _, _, kept in self.parts]


def _restored(parts: list[tuple[slice, Tensor]], like: Tensor, side: _Side) -> Tensor:
    """The parts' columns, zeros for classes without a product, out of the order of classes."""
    made = {where.start: part for where, part in parts}
    columns = [
        made[begin] if begin in made else like.new_zeros(like.size(0), width)
        for begin, width, _ in side.classes()
        if width
    ]
    return gather(torch.cat(columns, 1), 1, side.back)


def _forward(x: Tensor, weights: list[Tensor], bias: Tensor | None, tiles: _Tiles, scale: float) -> Tensor:
    if tiles.k != x.size(-1):
        raise RuntimeError(f"tiled linear: input has {x.size(-1)} features, the weight {tiles.k}")
    flat = gather(x.reshape(-1, x.size(-1)), 1, tiles.cols.order)
    parts = [
        (rows, scaled_mm(flat[:, cols], weight.t(), scale))
        for (rows, cols, _), weight in zip(tiles.parts, weights, strict=True)
    ]
    out = _restored(parts, parts[0][1] if parts else flat, tiles.rows)
    return whole((out if bias is None else out + bias.to(out.dtype)).view(*x.shape[:-1], tiles.n))


def _gradients(
    grad: Tensor,
    x: Tensor | None,
    weights: list[Tensor] | None,
    bias: Tensor | None,
    tiles: _Tiles,
    scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX where `weights` is given, dW where `x` is, db where `bias`."""
    flat = grad.reshape(-1, grad.size(-1))
    dy = gather(flat, 1, tiles.rows.order)
    dx = dw = None
    if weights is not None:
        parts = [
            (cols, scaled_mm(dy[:, rows], weight.to(dy.dtype), scale))
            for (rows, cols, _), weight in zip(tiles.parts, weights, strict=True)
        ]
        dx = _restored(parts, dy, tiles.cols).view(*grad.shape[:-1], tiles.k)
    if x is not None:
        ordered = gather(x.reshape(-1, x.size(-1)).to(dy.dtype), 1, tiles.cols.order)
        dw = _weight_gradient(dy, ordered, tiles, scale)
    return dx, dw, None if bias is None else flat.sum(0).to(bias.dtype)


def _weight_gradient(dy: Tensor, x: Tensor, tiles: _Tiles, scale: float) -> Tensor:
    dense = x.new_zeros(tiles.n, tiles.k, dtype=tiles.dtype)
    for rows, cols, kept in tiles.parts:
        product = scaled_mm(dy[:, rows].t(), x[:, cols], scale).to(tiles.dtype)
        if torch.is_grad_enabled() or kept.block_index is None:
            dense = dense + kept.scatter(product)
        else:
            index, width = kept.block_index
            dense.view(-1, width).index_copy_(0, index, product.view(-1, width))
    return dense


def _tiled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile_rows: int,
    tile_cols: int,
    lattice: Tensor,
    scale: float,
) -> Tensor:
    tiles = _Tiles(weight, (tile_rows, tile_cols), lattice)
    return _forward(x, tiles.gather(weight), bias, tiles, scale)


def _tiled_linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile_rows: int,
    tile_cols: int,
    lattice: Tensor,
    scale: float,
) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.size(0)])


def _tiled_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    tile_rows: int,
    tile_cols: int,
    lattice: Tensor,
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _Tiles(weight, (tile_rows, tile_cols), lattice)
    weights = tiles.gather(weight) if mask[0] else None
    bias = weight if mask[2] else None  # for its dtype
    dx, dw, db = _gradients(grad, x if mask[1] else None, weights, bias, tiles, scale)
    return (
        x.new_empty(0) if dx is None else dx.to(x.dtype),
        weight.new_empty(0) if dw is None else dw,
        weight.new_empty(0) if db is None else db,
    )


def _tiled_linear_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    tile_rows: int,
    tile_cols: int,
    lattice: Tensor,
    scale: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if mask[0] else 0),
        weight.new_empty(weight.shape if mask[1] else 0),
        weight.new_empty(weight.size(0) if mask[2] else 0),
    )


tiled_linear_op = define("tiled_linear", _tiled_linear, _tiled_linear_fake)
tiled_linear_backward_op = define("tiled_linear_backward", _tiled_linear_backward, _tiled_linear_backward_fake)
first_derivative_only(tiled_linear_backward_op)
autocast("tiled_linear")


def save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """What `formula` reads."""
    x, weight, _, ctx.tile_rows, ctx.tile_cols, lattice, ctx.scale = inputs
    ctx.mask = list(ctx.needs_input_grad[:3])
    ctx.save_for_backward(x, weight, lattice)


def formula(backward_op: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    """The derivative by a registered op."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dx, dW and db as far as they are asked for."""
        x, weight, lattice = ctx.saved_tensors
        shape = ctx.tile_rows, ctx.tile_cols
        grads = backward_op(grad, x, weight, *shape, lattice, ctx.scale, ctx.mask)
        return tuple(g if asked else None for g, asked in zip(grads, ctx.mask, strict=True))

    return backward


differentiable(tiled_linear_op, save, formula(tiled_linear_backward_op))


class _TiledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tile_rows: int,
        tile_cols: int,
        lattice: Tensor,
        scale: float,
    ) -> Tensor:
        """y [*, N] = scale * x [*, K] @ (W * kept tiles)^T + b; the kept tiles are held for the input gradient."""
        ctx.tiles = tiles = _Tiles(weight, (tile_rows, tile_cols), lattice)
        weights = tiles.gather(weight)
        ctx.scale, ctx.dtype, ctx.bias = scale, x.dtype, bias if ctx.needs_input_grad[2] else None
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.weights = weights if wants_x else None
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return _forward(x, weights, bias, tiles, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """dx [*, K], dW [N, K], db [N] from grad [*, N] as far as they are asked for, and None for the rest."""
        x, weight = ctx.saved_tensors
        weights = None
        if weight is not None:
            # with create_graph the kept weights must be part of the graph; a second backward gathers them anew
            reuse = ctx.weights is not None and not torch.is_grad_enabled()
            weights = ctx.weights if reuse else ctx.tiles.gather(weight)
            ctx.weights = None
        dx, dw, db = _gradients(grad, x, weights, ctx.bias, ctx.tiles, ctx.scale)
        return padded(ctx, None if dx is None else dx.to(ctx.dtype), dw, db)


def _tiled_linear_eager(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    lattice, scale = rest[2:]
    if lattice[0] == 1:  # all is kept
        return scaled_linear(x, weight, bias, scale)
    out: Tensor = _TiledLinear.apply(x, weight, bias, *rest)  # type: ignore[no-untyped-call]
    return out


EAGER[tiled_linear_op] = _tiled_linear_eager
