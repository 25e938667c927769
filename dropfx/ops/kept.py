"""What a gathered op is told of an axis: which units are kept, as runs, for all rows or for each group of them.

None stands for a dense axis. The schemas of registered ops, which know no structs, have the fields (`flat`).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """The kept units of an axis.

    Attributes:
        starts: int64 [count], first unit of each run, positions modulo the axis' length; [groups, count] where groups
            of rows have units of their own.
        run: units in a run.
        leading: length of the axis along which groups lie; 0 without groups.

    In a graph that is being rewritten the fields are nodes.
    """

    starts: Tensor
    run: int
    leading: int = 0

    @classmethod
    def of(cls, starts: Tensor | None, run: int, leading: int = 0) -> Kept | None:
        """What the fields in a row stand for; None where the axis is dense."""
        return None if starts is None else cls(starts, run, leading)

    # -- of one draw ---------------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Kept positions of a row, padding included."""
        return self.starts.size(-1) * self.run

    def window(self) -> int | None:
        """Start of the one run, where reading it costs no device synchronisation."""
        return int(self.starts) if self.starts.numel() == 1 and self.starts.device.type == "cpu" else None

    def whole_runs(self, units: int) -> bool:
        """Whether the runs are blocks that the axis divides into."""
        return self.starts.size(-1) > 1 and units % self.run == 0

    def blocks(self) -> Tensor:
        """Indices of the kept blocks, where the runs tile the axis."""
        return self.starts if self.run == 1 else self.starts // self.run

    def unwrapped(self) -> Tensor:
        """Kept positions [(groups,) width]; those of a run that goes past the end of the axis, past it."""
        if self.run == 1:
            return self.starts
        return (self.starts[..., None] + torch.arange(self.run, device=self.starts.device)).flatten(-2)

    def units(self, units: int) -> Tensor:
        """Kept positions [(groups,) width]."""
        positions = self.unwrapped()
        return positions if self.run == 1 or self.whole_runs(units) else positions % units

    # -- of several ----------------------------------------------------------------------------------------------------

    @property
    def grouped(self) -> bool:
        """Whether each group of rows keeps units of its own."""
        return self.starts.dim() == 2

    def ends(self, rows: int) -> list[int]:
        """Row at which each group ends."""
        each, rest = divmod(rows, self.leading) if self.leading else (0, rows)
        if rest:
            raise RuntimeError(
                f"groups: {rows} rows cannot be divided along a leading axis of {self.leading}; use groups=1 here"
            )
        return list(accumulate(size * each for size in _sizes(self.leading, len(self.starts))))

    def of_row(self, rows: int, row: int) -> Kept:
        """What is kept in a row."""
        if not self.grouped:
            return self
        group = next((g for g, end in enumerate(self.ends(rows)) if row < end), 0)
        return Kept(self.starts[group], self.run)


def _sizes(leading: int, groups: int) -> list[int]:
    """Leading positions of each group, as `torch.tensor_split` does it."""
    size, more = divmod(leading, groups)
    return [size + (group < more) for group in range(groups)]


# -- for backward -----------------------------------------------------------------------------------------------------


def save_kept(ctx: Any, *axes: Kept | None, tensors: tuple[Tensor | None, ...] = ()) -> None:
    """Save axes and other tensors with an autograd context, as its saved tensors."""
    ctx.save_for_backward(*(None if axis is None else axis.starts for axis in axes), *tensors)
    ctx.axes = [(0, 0) if axis is None else (axis.run, axis.leading) for axis in axes]


def saved_kept(ctx: Any) -> tuple[list[Kept | None], list[Any]]:
    """The axes and the other tensors of `save_kept`."""
    saved, count = ctx.saved_tensors, len(ctx.axes)
    return [Kept.of(starts, *rest) for starts, rest in zip(saved, ctx.axes, strict=False)], list(saved[count:])
