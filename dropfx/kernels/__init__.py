"""Triton kernels of the gathered ops: the gather happens in the product's loop, no compact weight is ever written.

Each launcher takes tensors on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1).
"""

from dropfx.kernels.axes import Axis
from dropfx.kernels.draw import MAX_SLOTS, DrawLaunch, DrawnSite
from dropfx.kernels.epilogue import ACTIVATIONS
from dropfx.kernels.matmul import gathered_matmul
from dropfx.kernels.tiles import tiled_matmul, tiled_weight_gradient
from dropfx.kernels.units import gather_units, scatter_units
from dropfx.kernels.weight_gradient import bias_gradient, weight_gradient

__all__ = [
    "ACTIVATIONS",
    "MAX_SLOTS",
    "Axis",
    "DrawLaunch",
    "DrawnSite",
    "bias_gradient",
    "gathered_matmul",
    "scatter_units",
    "gather_units",
    "tiled_matmul",
    "tiled_weight_gradient",
    "weight_gradient",
]
