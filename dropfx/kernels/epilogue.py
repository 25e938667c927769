"""What is done to a product's accumulator before it is stored, in float32."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "tanh")


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """`ACTIVATION` of x: the functions of torch.nn.functional, "gelu_tanh" for gelu's approximation."""
    if ACTIVATION == "relu":
        x = tl.where(x != x, x, tl.maximum(x, 0.0))  # keeps NaN, as torch does
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        # near 0 the difference of two numbers near 1 has few digits left: the series to x^7, good to 6e-8 of its value
        s = x * x
        series = x * (1.0 + s * (-0.3333333333 + s * (0.1333333333 - s * 0.0539682540)))
        x = tl.where(tl.abs(x) < 0.2, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)
    return x
