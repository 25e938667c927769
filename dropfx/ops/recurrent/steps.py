"""The rows of each step of a sequence, in the order in which a direction visits them.

Rows lie step after step, as in a PackedSequence: of `sizes[t]` sequences that are still alive at step t, never more
than at the step before. The state of a sequence that has ended, or has not begun, rests in its row of the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """Sequences alive at each step; `reverse`: the last step is visited first."""

    sizes: list[int]
    reverse: bool

    def visit(self, *values: Tensor | None, backward: bool = False) -> Iterator[tuple[int, list[Tensor]]]:
        """(size, rows of each value [N, *]) step by step; `backward`: in the opposite order."""
        parts = [value.split(self.sizes) for value in values if value is not None]
        order = range(len(self.sizes))
        for t in reversed(order) if self.reverse is not backward else order:
            yield self.sizes[t], [part[t] for part in parts]


def steps_of(shape: tuple[int, ...], batch_sizes: Tensor | None, reverse: bool) -> Steps:
    """Steps of gates [T, B, *], or of packed ones [N, *] with batch_sizes int64 [T]."""
    sizes = [shape[1]] * shape[0] if batch_sizes is None else batch_sizes.tolist()
    return Steps(sizes, reverse)
