"""What layers cost: Linears, convolutions and recurrences, whole or in part, forward and backward."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import fx

from dropfx import ops
from dropfx.graph.device_costs import DeviceCosts
from dropfx.graph.layers import products_of, taps_of
from dropfx.graph.nodes import op_name, value_of
from dropfx.graph.notes import notes


class Share(NamedTuple):
    """What is computed of a layer that multiplies.

    Attributes:
        keep_in, keep_out: kept shares of its input and output units.
        groups: draws, each with a product of its own.
        sharing: as many Linears share what is gathered of the weight.
    """

    keep_in: float = 1.0
    keep_out: float = 1.0
    groups: int = 1
    sharing: int = 1

    @property
    def whole(self) -> bool:
        """Nothing is dropped."""
        return self.keep_in == self.keep_out == 1


def layer_time(node: fx.Node, share: Share, costs: DeviceCosts, itemsize: int) -> float:
    """Seconds of the products of a layer that multiplies."""
    return (_linear if op_name(node) == "linear" else _convolution)(node, share, costs, itemsize)


def _convolution(node: fx.Node, share: Share, costs: DeviceCosts, itemsize: int) -> float:
    (keep_in, keep_out, groups, _), (m, n, k, products) = share, products_of(node)
    channels, taps = taps_of(node)
    if share.whole:
        return products * costs.convolution(m, n, channels, taps, itemsize)
    rows, columns = n * keep_out, k * keep_in
    each = products * costs.convolution(m / groups, rows, channels * keep_in, taps, itemsize)
    # a weight is gathered for each group, its gradient put among zeros; groups are cut and joined
    each += 2 * costs.move(rows * columns, itemsize) + costs.move(n * k, itemsize, 1 if groups == 1 else 3)
    cut = 0.0 if groups == 1 else 2 * costs.move(m * rows, itemsize)
    gathers = (keep_in < 1) + 2 * (keep_out < 1)  # of the weight, of the bias too
    return groups * each + gathers * (costs.gathered + 4 * (groups - 1) * costs.launch) + cut


def _linear(node: fx.Node, share: Share, costs: DeviceCosts, itemsize: int) -> float:
    (keep_in, keep_out, groups, sharing), (m, n, k, products) = share, products_of(node)
    if share.whole:
        gemm = costs.packed_gemm if _in_one_piece(node) is not None else costs.gemm
        return products * gemm(m, n, k, itemsize)
    rows, columns, size = n * keep_out, k * keep_in, n * k * keep_in * keep_out
    # forward and input gradient: a product a group, with a gathered weight, which several groups gather again
    gathered = (1 if groups == 1 else products - 1) * costs.move(size, itemsize)
    read = (products - 1) * costs.packed_gemm(m / groups, rows, columns, itemsize)
    added = costs.gemm(m / groups, rows, columns, itemsize) + costs.move(size, itemsize, 2 if groups == 1 else _ADDED)
    dense = costs.move(n * k, itemsize, 1)  # zeros
    written = groups * added + dense / sharing
    if groups > 1:
        written = min(written, costs.gemm(m, n, k, itemsize))
        written += _no_longer_in_one_piece(node, costs) if keep_in < 1 else 0.0
    return costs.gathered + groups * (read + gathered / sharing) + written


_ADDED = 5
"""Values read and written for each that a group adds to the gradient of a weight, whose runs are short."""


_CALLS_A_STEP = 15
"""Operations of an LSTM's step besides its product, 9 forward and 6 backward, where our own code walks the steps."""
_PASSES_A_STEP = 67
"""Values per unit that these read and write: 28 and 24, and 15 for the slopes of all steps."""


def recurrent_times(node: fx.Node, keep: float, costs: DeviceCosts) -> tuple[float, float]:
    """Seconds of the steps of a recurrence, forward and backward: as written, and with a share of W_hh kept.

    PyTorch has some recurrences fused, whose steps spend nothing between their products; none takes a kept weight.
    """
    pre, state, weight = (value_of(node.args[place]) for place in (1, 2, 4))
    assert pre is not None
    assert state is not None
    assert weight is not None
    batch, (n, k), itemsize = state.size(0), weight.shape, pre.element_size()
    rows = pre.numel() // pre.size(-1)
    steps = math.ceil(rows / max(batch, 1))

    def products(share: float) -> float:
        return steps * 2 * costs.gemm(batch, n, k * share, itemsize) + costs.gemm(n, k * share, rows, itemsize)

    whole, own = products(1.0), _own_steps(node, costs)
    # each step gathers of the state and scatters into its gradient; the kept weight is copied, its gradient put
    moved = steps * 2 * costs.move(batch * k, itemsize, 2 + keep) + 2 * costs.move(n * k, itemsize, 1 + keep)
    return whole / costs.packed if notes(node).get("one_piece") else whole + own, products(keep) + own + moved


def _own_steps(recurrence: fx.Node, costs: DeviceCosts) -> float:
    """Seconds that its steps take by our own code, beyond their products."""
    pre, state, weight = (value_of(recurrence.args[place]) for place in (1, 2, 4))
    assert pre is not None
    assert state is not None
    assert weight is not None
    rows = pre.numel() // pre.size(-1)
    steps = math.ceil(rows / max(state.size(0), 1))
    return steps * _CALLS_A_STEP * costs.launch + costs.move(rows * weight.size(1), pre.element_size(), _PASSES_A_STEP)


def _in_one_piece(linear: fx.Node) -> fx.Node | None:
    """The recurrence of which the product is part, where PyTorch has it fused."""
    user = next(iter(linear.users), None)
    if user is not None and op_name(user) == "transpose":
        user = next(iter(user.users), None)
    fused = user is not None and user.target is ops.recurrence_op and notes(user).get("one_piece")
    return user if fused else None


def _no_longer_in_one_piece(linear: fx.Node, costs: DeviceCosts) -> float:
    """Seconds that a recurrence takes longer if its inputs are several groups, whose product no fused one takes."""
    user = _in_one_piece(linear)
    if user is None:
        return 0.0
    whole, _ = recurrent_times(user, 1.0, costs)
    return whole * (costs.packed - 1) + _own_steps(user, costs)
