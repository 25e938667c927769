"""The arguments of a launch: an axis of kept units, groups of rows, and tables made from a draw."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """Kept units of an axis.

    Attributes:
        starts: int64 [count], or [groups, count]; None keeps all.
        run: units in a run.
        units: length of the dense axis.
    """

    starts: Tensor | None
    run: int
    units: int

    @property
    def width(self) -> int:
        """Kept positions."""
        return self.units if self.starts is None else self.starts.size(-1) * self.run

    @property
    def groups(self) -> int:
        """Draws: 1 where the whole batch shares one."""
        return self.starts.size(0) if self.starts is not None and self.starts.dim() == 2 else 1

    @property
    def wraps(self) -> bool:
        """Whether a run may pass the end: a window does, blocks do where the axis does not divide into them."""
        return self.starts is not None and (self.starts.size(-1) == 1 or self.ragged)

    @property
    def ragged(self) -> bool:
        """Whether positions past the end repeat units that other runs keep: padding, whose values are zeros."""
        return self.starts is not None and self.starts.size(-1) > 1 and self.units % self.run != 0

    def arguments(self, like: Tensor) -> tuple[Tensor, int]:
        """(starts, step from one group to the next); some tensor in the place of none."""
        if self.starts is None:
            return like, 0
        starts = self.starts.contiguous()
        return starts, starts.size(1) if starts.dim() == 2 else 0

    @property
    def compiled_run(self) -> int:
        """The run's length as kernels are compiled for it, 0 for a dense axis."""
        return 0 if self.starts is None else self.run

    def positions(self) -> Tensor:
        """Unit of each kept position, int64 [(groups,) width]; past the end where runs wrap."""
        assert self.starts is not None
        return (self.starts[..., None] + torch.arange(self.run, device=self.starts.device)).flatten(-2)

    def inverse(self) -> Tensor:
        """Position of each unit or -1 where it is dropped, int32 [groups, units]; not for padding."""
        assert self.starts is not None
        positions = self.positions().view(self.groups, -1) % self.units
        table = torch.full((self.groups, self.units), -1, dtype=torch.int32, device=positions.device)
        numbers = torch.arange(self.width, dtype=torch.int32, device=positions.device)
        return table.scatter_(1, positions, numbers.expand_as(positions))

    def order(self) -> Tensor:
        """All units, int32 [units]: the kept ones by position, then the dropped ones. Without groups."""
        assert self.starts is not None
        inverse = self.inverse()[0]
        dropped = (inverse < 0).cumsum(0) + (self.width - 1)
        place = torch.where(inverse < 0, dropped, inverse)
        units = torch.arange(self.units, dtype=torch.int32, device=place.device)
        return torch.empty_like(units).scatter_(0, place, units)


def largest_group(rows: int, leading: int, groups: int) -> int:
    """Rows of the largest of `groups` chunks of the leading axis."""
    return -(-leading // groups) * (rows // leading)
