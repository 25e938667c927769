"""torch.lstm and its kin layer by layer, with dropouts of the caller's between them: for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def layered(function: Any, args: tuple[Any, ...], between: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, ...]:
    """function(*args) with `between(output, gap)` in place of its own dropout after each layer but the last.

    Args:
        function: one of `dropout_ops.RECURRENT_FUNCTIONS`; its args are (input, hx, weights, biases, layers, dropout,
            train, bidirectional, batch_first), or for packed inputs (data, batch_sizes, hx, weights, ...,
            bidirectional).
    """
    packed = isinstance(args[3], (list, tuple))
    lead, (hx, weights, biases, layers, _, train, bidirectional, *rest) = args[: 1 + packed], args[1 + packed :]
    x, places = lead[0], 2 if bidirectional else 1
    each = len(weights) // layers
    last: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        here = slice(layer * places, (layer + 1) * places)
        state = tuple(part[here] for part in hx) if isinstance(hx, (list, tuple)) else hx[here]
        own = list(weights[layer * each : (layer + 1) * each])
        x, *left = function(x, *lead[1:], state, own, biases, 1, 0.0, train, bidirectional, *rest)
        last.append(tuple(left))
        x = between(x, layer) if layer < layers - 1 else x
    return x, *(torch.cat(parts) for parts in zip(*last, strict=True))
