"""What is done to a product's accumulator before it is stored, in float32."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "tanh")


@triton.jit
def _upper_tail(x):
    """Probability that a normal variable is above |x|: erfc(|x| / sqrt(2)) / 2."""
    # Chebyshev fit of Numerical Recipes, 6.2, good to 1.2e-7 of its value; the library's erf has two branches, whose
    # constants spill registers in large tiles, and 1 + erf(x) has no digits left far below 0
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.5 * z)
    p = 0.17087277
    p = p * t - 0.82215223
    p = p * t + 1.48851587
    p = p * t - 1.13520398
    p = p * t + 0.27886807
    p = p * t - 0.18628806
    p = p * t + 0.09678418
    p = p * t + 0.37409196
    p = p * t + 1.00002368
    p = p * t - 1.26551223
    return 0.5 * t * tl.exp(p - z * z)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """`ACTIVATION` of x: the functions of torch.nn.functional, "gelu_tanh" for gelu's approximation."""
    if ACTIVATION == "relu":
        x = tl.where(x != x, x, tl.maximum(x, 0.0))  # keeps NaN, as torch does
    elif ACTIVATION == "gelu":
        less = tl.abs(x) * _upper_tail(x)
        x = tl.where(x > 20.0, x, tl.maximum(x, 0.0) - less)  # infinity times 0 is NaN
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
