"""`rows`: whole samples of a residual branch (stochastic depth, arXiv 1603.09382)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dropfx.patterns.base import Fit, Pattern


class RowDraw(NamedTuple):
    """The rows of a batch that run through a branch.

    Attributes:
        rows: int64 [k], ascending, k >= 1.
        scale: 1, for a compiler as a tensor; 0 where no row was to be kept, and one runs all the same.
        fit: the pattern fitted to the batch.
    """

    rows: Tensor
    scale: float | Tensor
    fit: Fit

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[batch]: 0 where dropped, the scale where kept."""
        mask = torch.zeros(self.fit.units, dtype=dtype, device=self.rows.device)
        return mask.index_fill_(0, self.rows, float(self.scale))


@dataclass(frozen=True)
class Rows(Pattern):
    """Keep k of B rows, uniformly without replacement; k is B(1-p), rounded down or up at random.

    It is rounded up with the probability of its fraction, so that each row is dropped with exactly p. Of two rows the
    draws are correlated as without replacement: by -1/(B-1) where B(1-p) is whole. One row runs even where k is 0,
    multiplied by 0: the branch's parameters have gradients in every step, as data-parallel training expects.
    """

    name = "rows"
    fields = ("rows", "scale")
    on_host = True

    def fit(self, units: int, rate: float, groups: int = 1) -> Fit:
        """See `Pattern.fit`; `units` are the rows of the batch."""
        return Fit(units=units, run=1, count=0, numbers=units + 1, drawn_rate=rate)

    def choose(self, hashes: Tensor, fit: Fit) -> list[RowDraw]:
        """See `Pattern.choose`: the first number of a site rounds k, the others rank the rows."""
        places = fit.units * fit.keep
        whole = math.floor(places + 1e-9)  # .7 * 10 is 7, whatever floats make of it
        points = (hashes[:, 0].bitwise_right_shift(10) & (2**53 - 1)).tolist()
        counts = [whole + (point / 2**53 < places - whole - 1e-9) for point in points]
        order = hashes[:, 1:].argsort(dim=1)
        drawn = zip(order, counts, strict=True)
        return [RowDraw(ranked[: max(k, 1)].sort().values, float(k > 0), fit) for ranked, k in drawn]
