"""Tile sizes: how a product is cut for the GPU. Data, chosen by dtype and shape; tuning replaces rows of this table."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dropfx.kernels.interpreter import INTERPRETED


class Config(NamedTuple):
    """Sizes of a product's tile and how many warps and stages of prefetch it gets.

    Attributes:
        m, n: rows and columns of the tile of the result that a program makes.
        r: length of a step along the axis that is summed over.
    """

    m: int
    n: int
    r: int
    warps: int
    stages: int

    def options(self, dtype: torch.dtype, axes: str) -> dict[str, Any]:
        """Compile-time arguments of a product's launch; `axes`: the kernel's letters for m, n and r, as "MOR"."""
        blocks = {f"BLOCK_{axis}": size for axis, size in zip(axes, (self.m, self.n, self.r), strict=True)}
        return {
            "PRECISION": precision(dtype),
            "UPCAST": upcast(dtype),
            **blocks,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


LARGE: dict[int, Config] = {2: Config(128, 128, 64, 8, 3), 4: Config(64, 64, 16, 4, 3)}
"""Item size in bytes -> tile of a product that fills the device many times over."""

SMALL: dict[int, Config] = {2: Config(64, 64, 64, 4, 3), 4: Config(64, 64, 16, 4, 3)}
"""The same for products of few tiles, which need more programs rather than larger ones."""

INTERPRETER = Config(16, 32, 32, 1, 1)
"""Small, so that small tensors already have inner and edge tiles."""

PROGRAMS = 132
"""Programs below which smaller tiles are taken: one a multiprocessor of the largest current devices."""


def config_for(m: int, n: int, dtype: torch.dtype, small: bool = False) -> Config:
    """The tile for a result [m, n]; small: a kernel whose own state leaves few registers, or whose tiles skip work."""
    if INTERPRETED:
        return INTERPRETER
    large = LARGE[dtype.itemsize]
    fills = -(-m // large.m) * -(-n // large.n) >= PROGRAMS
    return large if fills and not small else SMALL[dtype.itemsize]


def precision(dtype: torch.dtype) -> str:
    """How operands are multiplied: float32 in full, unless PyTorch's own setting allows tf32."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed and not INTERPRETED else "ieee"


def upcast(dtype: torch.dtype) -> bool:
    """Whether a kernel multiplies in float32: the interpreter's `dot` takes bfloat16 for integers."""
    return INTERPRETED and dtype == torch.bfloat16
