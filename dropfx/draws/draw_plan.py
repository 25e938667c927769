"""Draws: the kept units of all sites of one call, made before the graph runs.

One 64-bit number from PyTorch's generator and a counter-based hash of (number, data-parallel rank, site, slot) decide
everything, so that `torch.manual_seed` reproduces a run, ranks seeded alike draw independently, and the device is never
asked for a value. The hash is splitmix64 (Steele et al., OOPSLA 2014) in int64 arithmetic, which wraps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dropfx.draws.runtime import shared
from dropfx.patterns import AnyDraw, Block, Draw, Fit, Pattern, RowDraw, Slice, TileDraw, padded_scale

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


@dataclass
class DrawPlan:
    """Draws all sites of a variant together, sites of one fit in one batch.

    Args:
        names: site names.
        fits: the fitted pattern of each site.
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
        self._batches = [(fit, sites, self._counters(fit, sites)) for fit, sites in members.items()]

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

    def _counters(self, fit: Fit, sites: list[int]) -> Tensor:
        keys = torch.tensor([_signed(site_key(self.names[i])) for i in sites], dtype=torch.int64)
        steps = torch.tensor([_signed(slot * _GOLDEN) for slot in range(1, fit.numbers + 1)], dtype=torch.int64)
        return (keys[:, None] + steps).to(self._source)

    @property
    def source(self) -> torch.device:
        """The device that the draws are made on, from whose default generator a call has its number."""
        return self._source

    def draw(self, number: Tensor) -> list[AnyDraw]:
        """All draws of one call from its number (int64 scalar)."""
        # hashed, not added: rank r of one step must not be rank 0 of another
        rank_step = _signed(data_parallel_rank() * _GOLDEN)
        if self._launch is not None:
            drawn = self._launch(number, rank_step)
            return [_of_starts(starts, fit) for starts, fit in zip(drawn, self.fits, strict=True)]
        if rank_step:
            number = _mix(number + rank_step)
        draws: list[Any] = [None] * len(self.names)
        for fit, sites, counters in self._batches:
            for index, draw in zip(sites, self.pattern.choose(_mix(counters + number), fit), strict=True):
                draws[index] = self._placed(draw)
        return draws

    def _placed(self, draw: AnyDraw) -> AnyDraw:
        if isinstance(draw, TileDraw) or self._source == self.device:
            return draw
        if isinstance(draw, RowDraw):
            return draw._replace(rows=draw.rows.to(self.device, non_blocking=True))
        scale = draw.scale
        scale = scale.to(self.device, non_blocking=True) if isinstance(scale, Tensor) else scale
        return draw._replace(starts=draw.starts.to(self.device, non_blocking=True), scale=scale)


def _of_starts(starts: Tensor, fit: Fit) -> Draw:
    scale = padded_scale(starts, fit.run, fit.units, fit.scale) if fit.ragged else fit.scale
    return Draw(starts, fit.run, scale, fit)
