"""Tile sizes: how a product is cut for the GPU. Data, chosen by dtype and shape; tuning replaces rows of this table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

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


LARGE: dict[int, Config] = {2: Config(128, 128, 64, 8, 3), 4: Config(128, 64, 32, 8, 2)}
"""Item size in bytes -> tile of a product that fills the device many times over."""

SMALL: dict[int, Config] = {2: Config(64, 64, 64, 4, 3), 4: Config(64, 64, 16, 8, 2)}
"""The same for products of few tiles, which need more programs rather than larger ones."""

OTHERS: dict[int, tuple[Config, ...]] = {
    2: (Config(128, 64, 64, 4, 4), Config(64, 128, 64, 4, 4)),
    4: (Config(64, 64, 32, 8, 2), Config(32, 64, 32, 4, 2)),
}
"""What tuning tries besides."""

WIDE: dict[int, tuple[Config, ...]] = {
    2: (Config(128, 256, 64, 8, 3), Config(128, 128, 64, 4, 4)),
    4: (),
}
"""What it tries on GPUs of sm_90 on, whose matrix instructions read operands from shared memory: others spill."""

INTERPRETER = Config(16, 32, 32, 1, 1)
"""Small, so that small tensors already have inner and edge tiles."""

PROGRAMS = 132
"""Programs below which smaller tiles are taken: one a multiprocessor of the largest current devices."""

Small = Literal["first", "only"] | None
"""Whether a kernel starts from the small tile, by which groups skip more, or may have no other."""

chosen: dict[str, Config] = {}
"""Product -> tile measured to be the fastest, before those of the tables. Filled by `dropfx.planning.autotune`."""

_listeners: list[dict[str, tuple[Config, ...]]] = []


@contextmanager
def listening() -> Iterator[dict[str, tuple[Config, ...]]]:
    """Collects the products that are launched inside, each with the tiles that its shape leaves to choose from."""
    asked: dict[str, tuple[Config, ...]] = {}
    _listeners.append(asked)
    try:
        yield asked
    finally:
        _listeners.remove(asked)


def config_for(product: str, m: int, n: int, r: int, dtype: torch.dtype, small: Small = None) -> Config:
    """The tile for a result [m, n], summed over r; small: whether a kernel's is small at first, or may be no larger."""
    if not (chosen or _listeners):
        return _by_table(m, n, dtype, small)
    # shapes of one power of two share a tile: batches and widths vary, the best tile hardly
    key = f"{product} {str(dtype).removeprefix('torch.')} {_bucket(m)}x{_bucket(n)}x{_bucket(r)}"
    for asked in _listeners:
        asked[key] = candidates(m, n, dtype, small)
    return chosen.get(key) or _by_table(m, n, dtype, small)


def candidates(m: int, n: int, dtype: torch.dtype, small: Small = None) -> tuple[Config, ...]:
    """Tiles worth trying for a result [m, n], the table's first: none that lies beside the result by more than half."""
    first = _by_table(m, n, dtype, small)
    size = dtype.itemsize
    rest: tuple[Config, ...] = (SMALL[size],) if small == "only" else tuned(size, _capability())
    if INTERPRETED:
        rest = (INTERPRETER,)
    fitting = [tile for tile in rest if tile.m < 2 * max(m, 32) and tile.n < 2 * max(n, 32)]
    return tuple(dict.fromkeys([first, *fitting]))


def tuned(size: int, capability: int) -> tuple[Config, ...]:
    """All tiles that tuning tries for items of `size` bytes, on GPUs of a generation (`capability`: 9 for sm_90)."""
    return (SMALL[size], LARGE[size], *OTHERS[size], *(WIDE[size] if capability >= 9 else ()))


def known(config: Config) -> bool:
    """Whether a tile is one of those that tuning tries."""
    return any(config in tuned(size, capability=9) for size in SMALL) or config == INTERPRETER


def _capability() -> int:
    """The current GPU's generation: 8 for sm_80, 9 for sm_90."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


def _by_table(m: int, n: int, dtype: torch.dtype, small: Small) -> Config:
    if INTERPRETED:
        return INTERPRETER
    large = LARGE[dtype.itemsize]
    fills = -(-m // large.m) * -(-n // large.n) >= PROGRAMS
    return large if fills and not small else SMALL[dtype.itemsize]


def _bucket(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def precision(dtype: torch.dtype) -> str:
    """How operands are multiplied: float32 in full, unless PyTorch's own setting allows tf32."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed and not INTERPRETED else "ieee"


def upcast(dtype: torch.dtype) -> bool:
    """Whether a kernel multiplies in float32: the interpreter's `dot` takes bfloat16 for integers."""
    return INTERPRETED and dtype == torch.bfloat16
