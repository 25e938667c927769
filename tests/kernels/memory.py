"""Tensors amid guard zones: a kernel that reads outside spreads NaN, one that writes outside is caught."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

GUARD = 64


def guarded(x: Tensor) -> Tensor:
    """A contiguous copy of x in the middle of a buffer of NaN."""
    buffer = torch.full((x.numel() + 2 * GUARD,), float("nan"), dtype=x.dtype, device=x.device)
    inner = buffer[GUARD : GUARD + x.numel()].view(x.shape)
    inner.copy_(x)
    return inner


@contextmanager
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launchers allocate by `new_empty`: give them memory amid zones that must be the same afterwards."""
    zones: list[Tensor] = []
    original = Tensor.new_empty

    def new_empty(like: Tensor, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if options:  # not a launcher's
            return original(like, *size, dtype=dtype, **options)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = prod(shape)
        zones.append(torch.full((count + 2 * GUARD,), 7.0, dtype=dtype or like.dtype, device=like.device))
        inner = zones[-1][GUARD : GUARD + count].view(shape)
        return inner.fill_(float("nan") if inner.is_floating_point() else 2**30)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        yield
    assert zones
    for zone in zones:
        assert (zone[:GUARD] == 7).all(), "written before the beginning"
        assert (zone[-GUARD:] == 7).all(), "written past the end"
