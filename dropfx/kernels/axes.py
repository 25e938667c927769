"""The arguments of a launch: an axis of kept units, and groups of rows."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

from torch import Tensor

_VECTOR = 16
"""Items that Triton knows sizes and strides to be multiples of: no vector that a thread loads is longer."""


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

    @property
    def alignment(self) -> int:
        """What the width is a multiple of, at most 16; the same for every draw."""
        return alignment(self.units if self.starts is None else self.run)

    @property
    def chunk(self) -> int:
        """Length of aligned stretches in which positions and units run on alike, at most 16; a window lies anywhere."""
        window = self.starts is not None and self.starts.size(-1) == 1
        return 1 if window else gcd(self.alignment, alignment(self.units))

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


def alignment(size: int) -> int:
    """The largest power of two up to 16 that divides a size."""
    return gcd(_VECTOR, size)


def largest_group(rows: int, leading: int, groups: int) -> int:
    """Rows of the largest of `groups` chunks of the leading axis."""
    return -(-leading // groups) * (rows // leading)
