"""Draws: the kept units of all sites of one call, made before the graph runs.

One 64-bit number from PyTorch's generator and a counter-based hash of (number, data-parallel rank, site, slot) decide
everything, so that `torch.manual_seed` reproduces a run, ranks seeded alike draw independently, and the device is never
asked for a value. The hash is splitmix64 (Steele et al., OOPSLA 2014) in int64 arithmetic, which wraps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dropfx.draws.runtime import shared
from dropfx.patterns import Block, Fit, Kept, KeptTiles, Pattern, Slice, padded_scale, unwrapped

if TYPE_CHECKING:
    from dropfx.kernels.draw import DrawLaunch


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_MIX_1, _MIX_2, *_SHIFTS = (
    # tensors: a Python number takes a third longer to reach the operation
    torch.tensor(constant, dtype=torch.int64, device="cpu")
    for constant in (*_FACTORS, 30, 27, 31)
)


def site_key(name: str) -> int:
    """64-bit key of a site; of its name, so that every front end draws alike."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser, in place, with arithmetic shifts: int64 has no others.

    They cost one bit, since x and ~x collide, and save three of eleven operations, which are what a draw costs.
    """
    first, second, third = _SHIFTS
    x.bitwise_xor_(x.bitwise_right_shift(first)).mul_(_MIX_1)
    x.bitwise_xor_(x.bitwise_right_shift(second)).mul_(_MIX_2)
    return x.bitwise_xor_(x.bitwise_right_shift(third))


def draw_number(device: torch.device) -> Tensor:
    """The one 64-bit number of a call, an int64 scalar on `device`, from that device's default generator."""
    if shared.own_numbers:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.rand(1, device=device)  # not the first number that other random operations will see
            return torch.empty((), dtype=torch.int64, device=device).random_()
    return torch.empty((), dtype=torch.int64, device=device).random_()


def data_parallel_rank() -> int:
    """Rank in the default process group, 0 where there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


class Draw(NamedTuple):
    """One site's outcome for a pattern of units: what the graph receives.

    Attributes:
        starts, run, scale: as in `patterns.Kept`.
        fit: the pattern fitted to the site's axis.
    """

    starts: Tensor
    run: int
    scale: float | Tensor
    fit: Fit

    @property
    def width(self) -> int:
        """Compact width of this draw, padding included."""
        return self.starts.size(-1) * self.run

    def by_unit(self) -> Draw:
        """The same with runs of one unit, so that the run's length does not vary by draw."""
        return self if self.run == 1 else self._replace(starts=unwrapped(self.starts, self.run), run=1)

    def units(self) -> Tensor:
        """Kept units, int64 [(groups,) width], padding wrapped to the axis' beginning."""
        return unwrapped(self.starts, self.run) % self.fit.units

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Dense multiplier [(groups,) units]: 0 where dropped, the scale where kept."""
        units = self.units()
        scale = torch.as_tensor(self.scale, dtype=dtype, device=units.device).expand_as(units)
        mask = torch.zeros(*units.shape[:-1], self.fit.units, dtype=dtype, device=units.device)
        return mask.scatter_add_(-1, units, scale)


class TileDraw(NamedTuple):
    """One site's outcome for tiles of a weight, as in `patterns.KeptTiles`."""

    lattice: Tensor
    scale: float

    @property
    def period(self) -> int:
        """One of this many tiles along a row or column of tiles is kept."""
        return int(self.lattice[0])

    @property
    def bias(self) -> int:
        """Sum of row and column, modulo the period, of the tiles that are kept."""
        return int(self.lattice[1])

    def mask(self, rows: int, columns: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Dense multiplier [rows, columns] of a weight cut in tiles of `shape`."""
        place = (torch.arange(rows) // shape[0])[:, None] + torch.arange(columns) // shape[1]
        kept: Tensor = (place - self.bias) % self.period == 0
        return kept.to(dtype) * self.scale


@dataclass
class DrawPlan:
    """Draws all sites of a specialisation together, sites of one shape in one batch.

    Args:
        names: site names.
        realisations: the fitted pattern of each site.
        pattern: the pattern.
        device: where the draws live.
        by_kernel: draw by one launch of `kernels.draw`, where it serves the pattern; the draws are the same.
    """

    names: Sequence[str]
    fits: Sequence[Fit]
    pattern: Pattern
    device: torch.device
    by_kernel: bool = False
    _launch: DrawLaunch | None = field(init=False, repr=False, default=None)
    _batches: list[tuple[Fit, list[int], Tensor]] = field(init=False, repr=False)
    _source: torch.device = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._source = torch.device("cpu") if self.pattern.on_host else self.device
        if self.by_kernel and (launch := self._make_launch()) is not None:
            self._launch, self._batches = launch, []
            return
        members: dict[Fit, list[int]] = {}
        for index, fit in enumerate(self.fits):
            members.setdefault(fit, []).append(index)
        self._batches = [(shape, sites, self._counters(shape, sites)) for shape, sites in members.items()]

    def _make_launch(self) -> DrawLaunch | None:
        """The kernel for this plan; None where it does not serve it: lattices, groups, very many blocks."""
        fits = self.fits
        if not fits or type(self.pattern) not in (Block, Slice) or any(fit.groups > 1 for fit in fits):
            return None
        from dropfx.kernels.draw import MAX_SLOTS, DrawLaunch, DrawnSite  # imports Triton

        if any(fit.numbers > MAX_SLOTS for fit in fits):
            return None
        window = type(self.pattern) is Slice
        sites = [
            DrawnSite(_signed(site_key(name)), fit.units if window else fit.numbers, fit.count, fit.run)
            for name, fit in zip(self.names, fits, strict=True)
        ]
        return DrawLaunch(sites, (_signed(_GOLDEN), *_FACTORS), self.device, window)

    def _counters(self, shape: Fit, sites: list[int]) -> Tensor:
        keys = torch.tensor([_signed(site_key(self.names[i])) for i in sites], dtype=torch.int64)
        steps = torch.tensor([_signed(slot * _GOLDEN) for slot in range(1, shape.numbers + 1)], dtype=torch.int64)
        return (keys[:, None] + steps).to(self._source)

    def draw_number(self) -> Tensor:
        """The one number of a call, from the default generator of the device that the draws are made on."""
        return draw_number(self._source)

    def draw(self, number: Tensor) -> list[Draw | TileDraw]:
        """All draws of one call from its number (int64 scalar)."""
        # hashed, not added: rank r of one step must not be rank 0 of another
        rank_step = _signed(data_parallel_rank() * _GOLDEN)
        if self._launch is not None:
            drawn = self._launch(number, rank_step)
            return [_of_starts(starts, fit) for starts, fit in zip(drawn, self.fits, strict=True)]
        if rank_step:
            number = _mix(number + rank_step)
        draws: list[Any] = [None] * len(self.names)
        for shape, sites, counters in self._batches:
            for index, kept in zip(sites, self.pattern.choose(_mix(counters + number), shape), strict=True):
                draws[index] = self._placed(kept, shape)
        return draws

    def _placed(self, kept: Kept | KeptTiles, shape: Fit) -> Draw | TileDraw:
        if isinstance(kept, KeptTiles):
            return TileDraw(*kept)
        if self._source == self.device:
            return Draw(*kept, shape)
        starts, run, scale = kept
        scale = scale.to(self.device, non_blocking=True) if isinstance(scale, Tensor) else scale
        return Draw(starts.to(self.device, non_blocking=True), run, scale, shape)


def _of_starts(starts: Tensor, fit: Fit) -> Draw:
    scale = padded_scale(starts, fit.run, fit.units, fit.scale) if fit.ragged else fit.scale
    return Draw(starts, fit.run, scale, fit)
