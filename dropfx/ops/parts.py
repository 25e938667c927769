"""The products of a gathered Linear, cut by rows where what is kept changes.

Each part of the rows has the same four products: forward, and the gradients of input, weight and bias. A `Single` has
rows of one draw. A `Stack` has several groups of equally many rows, whose kept weights are gathered, multiplied and
put back in one call each: with small products what costs is the call, not the arithmetic.

Shapes: x [M, K'], y and dy [M, N'], W [N, K], b [N]; of a stack G groups of m rows
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, groupby

import torch
from torch import Tensor

from dropfx.ops.define import whole
from dropfx.ops.groups import Piece, pieces, scatter_groups
from dropfx.ops.kept import Kept
from dropfx.ops.products import aligned_mm, misaligned, scaled_bmm, scaled_linear, scaled_mm
from dropfx.ops.runs import GatheredWeight, gather, scatter, stored_transposed

_STACKED = 1 << 26
"""Multiplications of a group's product up to which a stack is faster than one product after another."""

_STACK_SIZE = 1 << 19
"""Weights, inputs or outputs that all groups of a stack have together, unless W itself has more: bounds memory."""

_PARTS = 4
"""A compact weight gradient is made and scattered in parts of at most the dense one's size over this: bounds memory."""


class Single:
    """Rows low..high of x and y, in which one draw of each axis holds."""

    def __init__(self, low: int, high: int, weight: Tensor, rows: Kept | None, cols: Kept | None) -> None:
        self.low, self.high, self.groups = low, high, 1
        self._kept = GatheredWeight(weight, rows, cols)

    @property
    def size(self) -> int:
        """Weights that are kept."""
        return self._kept.size

    def gather(self, weight: Tensor) -> Tensor:
        """W' [N', K']"""
        return self._kept.gather(weight)

    def product(self, x: Tensor, compact: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """scale * x @ W'^T + b'"""
        _check(x, compact)
        rows = self._kept.rows
        return whole(scaled_linear(x, compact, bias if bias is None or rows is None else gather(bias, 0, rows), scale))

    def input_gradient(self, dy: Tensor, compact: Tensor, scale: float) -> Tensor:
        """scale * dy @ W'"""
        return scaled_mm(dy, compact.to(dy.dtype), scale)

    def weight_gradient(self, dense: Tensor | None, dy: Tensor, x: Tensor, scale: float) -> Tensor:
        """dense + scatter(scale * dy^T @ x), in place; where `dense` is None, a new tensor, stored as the weight is."""
        return _weight_gradient(dense, dy, x, self._kept, scale)

    def bias_gradient(self, dy: Tensor) -> Tensor:
        """[N]"""
        db, kept = dy.sum(0).to(self._kept.dtype), self._kept
        return db if kept.rows is None else scatter(db, 0, kept.rows, kept.n)


def _check(x: Tensor, compact: Tensor) -> None:
    if x.size(-1) != compact.size(-1):
        raise RuntimeError(f"gathered linear: input has {x.size(-1)} features, the kept weight {compact.size(-1)}")


class Stack:
    """Rows of several groups, equally many each, with whole runs kept."""

    def __init__(self, found: Sequence[Piece], weight: Tensor) -> None:
        self.low, self.high, self.groups = found[0].low, found[-1].high, len(found)
        rows, cols = (_stacked([piece.kept[axis] for piece in found]) for axis in (0, 1))
        self._dtype, (n, k) = weight.dtype, weight.shape
        self._shape = n, k
        self._rows = None if rows is None else rows.units(n)  # [G, N'] or [N']
        self._tiles = k if cols is None else cols.run
        self._cols = None if cols is None else cols.blocks()
        self._kept = n if rows is None else rows.width, k if cols is None else cols.width

    @property
    def size(self) -> int:
        """Weights that are kept, by all groups together."""
        return self.groups * math.prod(self._kept)

    @cached_property
    def _index(self) -> Tensor:
        """Of each kept run of a row, group by group, its place in the weight seen as [N * K/b, b]."""
        n, k = self._shape
        rows = self._rows
        if rows is None:
            assert self._cols is not None
            rows = torch.arange(n, device=self._cols.device)
        index = rows.expand(self.groups, -1)
        if self._cols is not None:
            index = index[:, :, None] * (k // self._tiles) + self._cols.expand(self.groups, -1)[:, None]
        return index.reshape(-1)

    def gather(self, weight: Tensor) -> Tensor:
        """W' of all groups [G, N', K']"""
        return weight.reshape(-1, self._tiles).index_select(0, self._index).view(self.groups, *self._kept)

    def product(self, x: Tensor, compact: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """Of each group scale * x @ W'^T + b'"""
        _check(x, compact)
        added = bias if bias is None or self._rows is None else bias[self._rows]
        if added is not None:
            added = added.expand(self.groups, -1)[:, None]
        return scaled_bmm(self._by_group(x), compact.transpose(1, 2), scale, added).flatten(0, 1)

    def input_gradient(self, dy: Tensor, compact: Tensor, scale: float) -> Tensor:
        """Of each group scale * dy @ W'"""
        return scaled_bmm(self._by_group(dy), compact.to(dy.dtype), scale).flatten(0, 1)

    def weight_gradient(self, dense: Tensor | None, dy: Tensor, x: Tensor, scale: float) -> Tensor:
        """dense + the groups' scatter(scale * dy^T @ x), in place; where `dense` is None, a new tensor."""
        made = scaled_bmm(self._by_group(dy).transpose(1, 2), self._by_group(x), scale).to(self._dtype)
        dense = made.new_zeros(self._shape) if dense is None else dense
        tiles, values = dense.view(-1, self._tiles), made.view(-1, self._tiles)
        if torch.is_grad_enabled():
            return tiles.index_add(0, self._index, values).view(self._shape)
        tiles.index_add_(0, self._index, values)
        return dense

    def bias_gradient(self, dy: Tensor) -> Tensor:
        """[N]"""
        if self._rows is None or self._rows.dim() == 1:
            db = dy.sum(0).to(self._dtype)
        else:
            db = self._by_group(dy).sum(1).to(self._dtype)
        if self._rows is None:
            return db
        return db.new_zeros(self._shape[0]).index_add(0, self._rows.reshape(-1), db.reshape(-1))

    def _by_group(self, values: Tensor) -> Tensor:
        return values.reshape(self.groups, -1, values.size(1))


def _stacked(each: list[Kept | None]) -> Kept | None:
    """What the groups keep of an axis: starts [G, count]."""
    first = each[0]
    return None if first is None else Kept(torch.stack([kept.starts for kept in each if kept is not None]), first.run)


class Parts:
    """All rows of x [M, K'] and y [M, N'], cut in parts.

    Args:
        count: M.
        weight: [N, K].
        rows, cols: what is kept of it.
    """

    def __init__(self, count: int, weight: Tensor, rows: Kept | None, cols: Kept | None) -> None:
        self._rows, self._cols, self._shape, self._dtype = rows, cols, (weight.size(0), weight.size(1)), weight.dtype
        self._on_cpu = weight.device.type == "cpu"
        self._transposed = stored_transposed(weight)
        self._each = _cut(count, weight, rows, cols)
        self.size = sum(part.size for part in self._each)

    def gather(self, weight: Tensor) -> Iterator[Tensor]:
        """The kept weights of each part."""
        return (part.gather(weight) for part in self._each)

    def product(self, x: Tensor, bias: Tensor | None, gathered: Iterable[Tensor], scale: float) -> Tensor:
        """y [M, N'] by the kept weights."""
        each = iter(gathered)  # by `next`, so that no kept weight outlives its product
        found = (part.product(x[part.low : part.high], next(each), bias, scale) for part in self._each)
        return _joined(found, len(x))

    def input_gradient(self, dy: Tensor, gathered: Iterable[Tensor], scale: float) -> Tensor:
        """dX [M, K'] by the kept weights."""
        each = iter(gathered)
        found = (part.input_gradient(dy[part.low : part.high], next(each), scale) for part in self._each)
        return _joined(found, len(dy))

    def weight_gradient(self, dy: Tensor, x: Tensor, scale: float) -> Tensor:
        """dW [N, K], stored as the weight is."""
        if self._dense_pays(len(dy)):
            x, dy = self._dense(x, self._cols, 1), self._dense(dy, self._rows, 0)
            if self._transposed:
                return scaled_mm(x.t(), dy, scale).to(self._dtype).t()
            return scaled_mm(dy.t(), x, scale).to(self._dtype)
        dw: Tensor | None = None
        for part in self._each:
            dw = part.weight_gradient(dw, dy[part.low : part.high], x[part.low : part.high], scale)
        assert dw is not None
        return dw

    def bias_gradient(self, dy: Tensor) -> Tensor:
        """db [N]"""
        made = [part.bias_gradient(dy[part.low : part.high]) for part in self._each]
        return sum(made[1:], start=made[0])

    def _dense(self, values: Tensor, kept: Kept | None, axis: int) -> Tensor:
        return values if kept is None else scatter_groups(values, 1, kept, self._shape[axis])

    def _dense_pays(self, rows: int) -> bool:
        """Whether one product of rows with zeros makes the weight's gradient faster than one of kept units a group.

        The arithmetic of all groups' products is that of one draw, but each adds to the kept weights of its group:
        with many groups of few rows that costs more.
        """
        groups = sum(part.groups for part in self._each)
        if groups == 1 or not self._on_cpu:
            return False
        n, k = self._shape
        run = self._cols.run if self._cols is not None else k
        added = self.size * (_ADDED + _ADDED_RUN / run) + 2 * rows * self.size / groups / _RATE
        return 2 * rows * n * k / _RATE + rows * (n + k) * _ADDED < added


_RATE = 1.3e11
"""FLOP/s of a weight's gradient on a few cores of a CPU with wide vectors."""
_ADDED, _ADDED_RUN = 5e-10, 1.8e-8
"""Seconds for each element, and each run of them, that is added to the weight's gradient."""


def _joined(parts: Iterable[Tensor], count: int) -> Tensor:
    """All rows of what the parts made, one after another: never all twice in memory, where no derivative is taken."""
    made = iter(parts)
    first = next(made)
    if len(first) == count:
        return first
    if torch.is_grad_enabled():
        return torch.cat([first, *made])
    out, done = first.new_empty(count, first.size(1)), 0
    for part in chain([first], made):
        out[done : done + len(part)] = part
        done += len(part)
    return out


def _cut(count: int, weight: Tensor, rows: Kept | None, cols: Kept | None) -> Sequence[Single | Stack]:
    if not any(kept is not None and kept.grouped for kept in (rows, cols)):
        return [Single(0, count, weight, rows, cols)]
    found = pieces(count, rows, cols)
    n, k = _kept_sizes(found[0], weight)
    m = found[0].high - found[0].low
    if not 0 < m * n * k < _STACKED:
        return [_single(piece, weight) for piece in found]
    most = max(max(weight.numel(), _STACK_SIZE) // max(n * k, m * n, m * k), 1)
    runs = [list(run) for _, run in groupby(found, lambda piece: piece.high - piece.low)]
    stacks = [run[first : first + most] for run in runs for first in range(0, len(run), most)]
    return [Stack(stack, weight) if len(stack) > 1 else _single(stack[0], weight) for stack in stacks]


def _single(piece: Piece, weight: Tensor) -> Single:
    rows, cols = piece.kept
    return Single(piece.low, piece.high, weight, rows, cols)


def _kept_sizes(piece: Piece, weight: Tensor) -> tuple[int, int]:
    """N' and K'; 0 where a group keeps anything but whole runs, which an axis divides into."""
    n, k = (
        size if axis is None else axis.width if axis.whole_runs(size) else 0
        for axis, size in zip(piece.kept, weight.shape, strict=True)
    )
    return (n, k) if weight.is_contiguous() else (0, 0)


def _weight_gradient(dense: Tensor | None, dy: Tensor, x: Tensor, kept: GatheredWeight, scale: float) -> Tensor:
    """dense + the gradient from these rows, in place; where `dense` is None, a new tensor, stored as the weight is."""
    if kept.flipped is not None:
        return _weight_gradient(None if dense is None else dense.t(), x, dy, kept.flipped, scale).t()
    if torch.is_grad_enabled():
        made = kept.scatter(scaled_mm(dy.t(), x, scale).to(kept.dtype))
        return made if dense is None else dense + made
    if dense is None and kept.dtype == dy.dtype and (starts := kept.row_blocks()) is not None:
        return _product_in_rows(dy, x, kept, starts, scale)
    if kept.block_index is None:
        product = scaled_mm(dy.t(), x, scale).to(kept.dtype)
        return kept.scatter(product) if dense is None else kept.add(dense, product)
    add = dense is not None
    dense = x.new_zeros(kept.n, kept.k, dtype=kept.dtype) if dense is None else dense
    parts = -(-_PARTS * dy.size(1) * x.size(1) // dense.numel())
    step = -(-dy.size(1) // parts)
    # below no product is given a name: one is freed before the next is made
    if kept.rows is None and kept.cols is not None and misaligned(x):
        blocks, width = kept.cols.blocks(), kept.cols.run
        for part, there in zip(dy.split(step, 1), dense.view(kept.n, -1, width).split(step), strict=True):
            write = there.index_add_ if add else there.index_copy_
            write(1, blocks, aligned_mm(part.t(), x, scale).unflatten(1, (-1, width)).to(kept.dtype))
        return dense
    index, width = kept.block_index
    write = dense.view(-1, width).index_add_ if add else dense.view(-1, width).index_copy_
    for part, where in zip(dy.split(step, 1), index.split(step * (x.size(1) // width)), strict=True):
        write(0, where, scaled_mm(part.t(), x, scale).view(-1, width).to(kept.dtype))
    return dense


def _product_in_rows(dy: Tensor, x: Tensor, kept: GatheredWeight, starts: list[int], scale: float) -> Tensor:
    """The gradient where whole rows are kept, in its own memory.

    The product fills the first rows; then its blocks of rows move to their places, the last one first: no place lies
    before what has to move there, and blocks do not overlap.
    """
    run = dy.size(1) // len(starts)
    dense = x.new_empty(kept.n, kept.k)
    compact = dense[: dy.size(1)]
    torch.addmm(compact, dy.t(), x, beta=0, alpha=scale, out=compact)
    end = kept.n
    for number, start in reversed(list(enumerate(starts))):
        if start > number * run:
            dense[start : start + run] = dense[number * run : (number + 1) * run]
        dense[start + run : end].zero_()
        end = start
    dense[:end].zero_()
    return dense
