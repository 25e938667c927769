"""W' = W[rows][:, cols] as a value of its own, and whether it waits for backward or is gathered again there.

Shapes: W [N, K], W' [N', K'], x [*, K']
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import define
from dropfx.ops.kept import Kept
from dropfx.ops.runs import GatheredWeight, stored_transposed

_GATHER_AGAIN = 512
"""Rows of x from which on a large kept weight is gathered again for the input gradient rather than held until then.

Gathering costs as much as the products of a dozen rows, so about 1% of all three products of this many. With fewer rows
the copy is no matter: activations are small beside the weights' gradients, which take its place in backward.
"""


def worth_gathering_again(x: Tensor, compact: Tensor) -> bool:
    """Whether that hardly takes time, and a kept weight more than the mask and the dropped x, which nobody keeps.

    False where sizes vary: a compiler would compile again for the other answer.
    """
    sizes = math.prod(x.shape[:-1]), compact.numel(), x.numel()
    return all(type(n) is int for n in sizes) and sizes[0] >= _GATHER_AGAIN and sizes[1] > 2 * sizes[2]


def _gathered_weight(weight: Tensor, rows: Kept | None, cols: Kept | None, after: Tensor | None = None) -> Tensor:
    out = GatheredWeight(weight, rows, cols).gather(weight)
    # a window: a registered op may not return a view of its input
    if torch._C._is_alias_of(out, weight):  # type: ignore[attr-defined]
        return _gathered_weight_fake(weight, rows, cols).copy_(out)
    return out


def _gathered_weight_fake(weight: Tensor, rows: Kept | None, cols: Kept | None, *_: Any) -> Tensor:
    n = weight.size(0) if rows is None else rows.width
    k = weight.size(1) if cols is None else cols.width
    return weight.new_empty(k, n).t() if stored_transposed(weight) else weight.new_empty(n, k)


gathered_weight_op = define("gathered_weight", _gathered_weight, _gathered_weight_fake)
"""W[rows][:, cols] without a gradient: `gathered_linear` makes the weight's gradient.

Not before there is `after`, whose values are not read.
"""
