"""The product of a recurrence: small on one side, the same weight at every step.

At batch 20 it is bound by the bytes of the weight, and a plain product reaches a third of that bound. oneDNN's blocked
layout comes close to it; bringing the weight into it costs about as much as five plain products, once a sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
"""(x [b, K], y [b, N]) -> x @ weight^T + y"""

_LEAST_BYTES = 1 << 20
"""Weights below this stay in a core's cache between two steps, where a plain product is as fast."""
_LEAST_STEPS = 8


def product_with(weight: Tensor, batch: int, steps: int) -> Product:
    """The product with a weight [N, K] of which `steps` will be made, of up to `batch` rows each."""
    if _pays(weight, steps):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), batch)
        fused = torch.ops.mkldnn._linear_pointwise.binary
        return lambda x, y: fused(x, y, packed, None, "add")
    transposed = weight.t()
    return lambda x, y: torch.addmm(y, x, transposed)


def _pays(weight: Tensor, steps: int) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.float32
        and torch.backends.mkldnn.is_available()
        and weight.numel() * weight.element_size() >= _LEAST_BYTES
        and steps >= _LEAST_STEPS
    )
