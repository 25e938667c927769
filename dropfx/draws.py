"""Draws: the kept units of all sites of one call, made before the graph runs.

One 64-bit number from PyTorch's generator and a counter-based hash of (number, data-parallel rank, site, slot) decide
everything, so that `torch.manual_seed` reproduces a run, ranks seeded alike draw independently, and the device is never
asked for a value. The hash is splitmix64 (Steele et al., OOPSLA 2014) in int64 arithmetic, which wraps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dropfx.patterns import Pattern, Realisation
from dropfx.runtime import runtime


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def site_key(name: str) -> int:
    """64-bit key of a site; of its name, so that every front end draws alike."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser, in place, with arithmetic shifts: int64 has no others.

    They cost one bit, since x and ~x collide, and save three of eleven operations, which are what a draw costs.
    """
    x ^= x >> 30
    x *= _MIX_1
    x ^= x >> 27
    x *= _MIX_2
    x ^= x >> 31
    return x


def draw_number(device: torch.device) -> Tensor:
    """The one 64-bit number of a call, an int64 scalar on `device`, from that device's default generator."""
    if runtime.own_numbers:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.rand(1, device=device)  # not the first number that other random operations will see
            return torch.empty((), dtype=torch.int64, device=device).random_()
    return torch.empty((), dtype=torch.int64, device=device).random_()


def data_parallel_rank() -> int:
    """Rank in the default process group, 0 where there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


@dataclass(frozen=True)
class Draw:
    """One site's outcome: what the graph receives.

    Attributes:
        starts: int64 [count], first unit of each kept run.
        run: units in a run; positions are taken modulo the number of units.
        scale: multiplier of the kept units: a float, or [width] with zeros at the padding of a ragged block.
        realisation: the pattern fitted to the site's axis.
    """

    starts: Tensor
    run: int
    scale: float | Tensor
    realisation: Realisation

    @property
    def width(self) -> int:
        return self.realisation.width

    def units(self) -> Tensor:
        """Kept units, int64 [width], padding wrapped to the axis' beginning."""
        positions = (self.starts[:, None] + torch.arange(self.run, device=self.starts.device)).flatten()
        return positions % self.realisation.units

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Dense multiplier [units]: 0 where dropped, the scale where kept."""
        scale = torch.as_tensor(self.scale, dtype=dtype, device=self.starts.device).expand(self.width)
        mask = torch.zeros(self.realisation.units, dtype=dtype, device=self.starts.device)
        return mask.index_add_(0, self.units(), scale)


@dataclass
class DrawPlan:
    """Draws all sites of a specialisation together, sites of one shape in one batch.

    Args:
        names: site names.
        realisations: the fitted pattern of each site.
        pattern: the pattern.
        device: where the draws live.
    """

    names: Sequence[str]
    realisations: Sequence[Realisation]
    pattern: Pattern
    device: torch.device
    _batches: list[tuple[Realisation, list[int], Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        members: dict[Realisation, list[int]] = {}
        for index, realisation in enumerate(self.realisations):
            members.setdefault(realisation, []).append(index)
        self._batches = [(shape, sites, self._counters(shape, sites)) for shape, sites in members.items()]

    def _counters(self, shape: Realisation, sites: list[int]) -> Tensor:
        keys = torch.tensor([_signed(site_key(self.names[i])) for i in sites], dtype=torch.int64)
        steps = torch.tensor([_signed(slot * _GOLDEN) for slot in range(1, shape.slots + 1)], dtype=torch.int64)
        return (keys[:, None] + steps).to(self.device)

    def draw(self, number: Tensor) -> list[Draw]:
        """All draws of one call from its number (int64 scalar)."""
        rank = data_parallel_rank()
        if rank:
            # hashed, not added: rank r of one step must not be rank 0 of another
            number = _mix(number + _signed(rank * _GOLDEN))
        draws: list[Draw | None] = [None] * len(self.names)
        for shape, sites, counters in self._batches:
            starts = self.pattern.starts(_mix(counters + number), shape)
            for index, row in zip(sites, starts.unbind(0), strict=True):
                draws[index] = Draw(row, shape.run, _scale(row, shape), shape)
        return [draw for draw in draws if draw is not None]


def _scale(starts: Tensor, shape: Realisation) -> float | Tensor:
    if not shape.ragged:
        return shape.scale
    positions = (starts[:, None] + torch.arange(shape.run, device=starts.device)).flatten()
    return (positions < shape.units).to(torch.float64) * shape.scale
