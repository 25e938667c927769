"""How many draws a batch has under groups="auto": as many as keep what independent dropout does, and no more.

An update averages over the R rows that PyTorch gives a mask each. The variance that masks add to it is that of one
multiplier, p/(1-p), over the number of different masks: p/(1-p)/R there, p/(1-p)/D with D draws. What the rows
themselves add falls as 1/R too, so that the update is noisier by a factor that grows as R/D * p/(1-p). `auto` keeps
this number below a bound, which is measured (docs/patterns.md): it decides, not the kind of model. A language model
with 700 rows at p = .5 loses 2.7% of perplexity with 175 rows a draw, 1.6% with 88.
"""

from __future__ import annotations

import math

ROWS_PER_DRAW = {"auto": 88.0, "faithful": 22.0}
"""Largest R/D * p/(1-p), by the name that asks for it."""

MOST = {"auto": 8, "faithful": 32}
"""Draws beyond which another one costs more than the noise that it takes away: of one draw's, 1/8 is left."""


def draw_count(rows: int, leading: int, rate: float, asked: str) -> int:
    """Draws of a site: a power of two, so that the groups of neighbouring sites meet, at most one a leading position.

    Args:
        rows: masks that PyTorch's dropout draws, R.
        leading: length of the axis that is cut in groups.
        rate: p.
        asked: a key of ROWS_PER_DRAW.
    """
    needed = rows * rate / (1 - rate) / ROWS_PER_DRAW[asked]
    draws = 2 ** math.ceil(math.log2(needed)) if needed > 1 else 1
    while draws > min(MOST[asked], max(leading, 1)):
        draws //= 2
    return draws
