"""`block`: exactly k of n/b blocks of b contiguous units, drawn uniformly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dropfx.errors import InvalidOption
from dropfx.patterns.base import MAX_RATE_ERROR, Draw, Fit, Pattern, PatternRefused, nearest_count, padded_scale

MIN_BLOCKS = 32
"""Blocks on an axis below which an automatic size is made smaller: fewer give too few sub-models."""
MAX_AUTO_BLOCK = 128
"""Longer runs copy no faster."""


@dataclass(frozen=True)
class Block(Pattern):
    """Keep k of the axis' blocks of `size` contiguous units, each choice equally likely.

    Args:
        size: units per block. "auto" takes the largest divisor of the axis, at most 128, that leaves at least 32 blocks
            and meets the rate to 0.02; an axis of less than 64 units gets blocks of one unit. A size of your own is
            taken as it is, and the drawn rate is the nearest that whole blocks give, however far that is from p.

    Raises:
        InvalidOption: `size` is neither "auto" nor a positive integer.
    """

    size: int | str = "auto"
    name = "block"

    def __post_init__(self) -> None:
        if self.size == "auto":
            return
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise InvalidOption(f"block: got {self.size!r}, accepted are 'auto' and integers >= 1")

    def fit(self, units: int, rate: float, groups: int = 1) -> Fit:
        """See `Pattern.fit`: the k of n/b blocks nearest to the rate; with "auto" the largest b that meets it.

        Raises:
            PatternRefused: fewer than two blocks, or with "auto" no size that meets the rate to 0.02.
        """
        if isinstance(self.size, int):
            return _fit(units, rate, self.size, groups)
        if units < 2:
            raise PatternRefused(f"an axis of {units} unit(s) is too short to keep some and drop some")
        for size in range(min(MAX_AUTO_BLOCK, max(units // MIN_BLOCKS, 1)), 0, -1):
            if units % size:
                continue
            fit = _fit(units, rate, size, groups)
            if abs(fit.drawn_rate - rate) <= MAX_RATE_ERROR:
                return fit
        nearest = _fit(units, rate, 1, groups).drawn_rate
        raise PatternRefused(
            f"of {units} units the nearest rate to {rate:g} is {nearest:.3g}, more than {MAX_RATE_ERROR} away"
        )

    def choose(self, hashes: Tensor, fit: Fit) -> list[Draw]:
        """See `Pattern.choose`: the blocks with the largest hashes; groups are dealt theirs from shuffled decks."""
        # in order, so that neighbouring kept blocks are found next to each other
        if fit.groups == 1:
            starts = hashes.topk(fit.count, dim=1, sorted=False).indices.sort(dim=-1).values
        else:
            starts = _deal(hashes.unflatten(1, (-1, _blocks(fit))), fit)
        if fit.run > 1:
            starts *= fit.run
        if not fit.ragged:
            return [Draw(row, fit.run, fit.scale, fit) for row in starts.unbind(0)]
        scales = padded_scale(starts, fit.run, fit.units, fit.scale)
        return [Draw(row, fit.run, scale, fit) for row, scale in zip(starts.unbind(0), scales.unbind(0), strict=True)]


def _blocks(fit: Fit) -> int:
    return -(-fit.units // fit.run)


def _fit(units: int, rate: float, size: int, groups: int) -> Fit:
    if size >= units:
        raise PatternRefused(f"block size {size} leaves fewer than two blocks on an axis of {units} units")
    blocks = -(-units // size)
    count = nearest_count(blocks, rate)
    return Fit(
        units=units,
        run=size,
        count=count,
        numbers=blocks * -(-_dealt(blocks, count, groups) * groups // blocks),
        drawn_rate=1.0 - count / blocks,
        ragged=units % size != 0,
        groups=groups,
    )


def _dealt(blocks: int, count: int, groups: int) -> int:
    """Cards of a group: the blocks that it keeps, or, of several groups, those that it drops where they are fewer."""
    return count if groups == 1 else min(count, blocks - count)


def _deal(hashes: Tensor, fit: Fit) -> Tensor:
    """Blocks of each group in order, int64 [sites, groups, count], from hashes [sites, decks, blocks].

    Shuffled decks of all blocks are dealt one after another, `cards` to a group, so that over the groups each block
    is dealt floor or ceil of cards * groups / blocks times. A group that straddles two decks must not get a block
    twice: what it holds goes to the end of the second deck, in random order, which treats all blocks alike.
    """
    blocks = hashes.size(-1)
    cards = _dealt(blocks, fit.count, fit.groups)
    dealt = 0
    decks: list[Tensor] = []
    for keys in (hashes >> 2).unbind(1):  # 2 bits of room, to move keys behind all others
        held = dealt % cards
        if held:
            keys = keys.scatter_add(1, decks[-1][:, -held:], keys.new_full((len(keys), held), 2**62))
        decks.append(keys.argsort(dim=1))
        dealt += blocks
    hands = torch.cat(decks, dim=1)[:, : cards * fit.groups].reshape(-1, fit.groups, cards)
    if cards == fit.count:
        return hands.sort(dim=-1).values
    dropped = torch.zeros(*hands.shape[:-1], blocks, dtype=torch.int8, device=hands.device).scatter_(-1, hands, 1)
    return dropped.argsort(dim=-1, stable=True)[..., : fit.count]
