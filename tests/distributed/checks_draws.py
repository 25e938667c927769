"""Draws of ranks: apart though seeded alike, without communication, and as ever where there is one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import dropfx
from tests.catalogue.case import mlp, recording
from tests.distributed.harness import WORLD, Checks
from tests.oracle import oracle

checks = Checks()
STEPS, UNITS = 200, 64


def masks(model: torch.nn.Module, seed: int = 0) -> oracle.Masks:
    torch.manual_seed(seed)
    with recording() as found:
        model(torch.ones(2, 48))
    return dict(found)


def gathered(value: Any) -> list[Any]:
    every: list[Any] = [None] * WORLD
    dist.all_gather_object(every, value)
    return every


@checks
def ranks_seeded_alike_draw_independently() -> None:
    """Two ranks drop a unit together as often as chance does: the share of both is p * p within 5 deviations."""
    model = dropfx.compile(mlp(48, UNITS, 8), block=1, min_speedup=0)
    dropped = torch.stack([masks(model, seed)["2"] == 0 for seed in range(STEPS)])
    first, second = gathered(dropped)
    assert not torch.equal(first, second)
    both = (first & second).double().mean()
    assert abs(both - 0.25) < 5 * (0.25 * 0.75 / (STEPS * UNITS)) ** 0.5


@checks
def a_rank_repeats_its_own_draws() -> None:
    model = dropfx.compile(mlp(48, UNITS, 8), min_speedup=0)
    assert torch.equal(masks(model)["2"], masks(model)["2"])


@checks
def a_draw_needs_no_other_rank() -> None:
    """One rank runs alone; it would wait for ever in a collective."""
    model = dropfx.compile(mlp(48, UNITS, 8), min_speedup=0)
    if dist.get_rank() == WORLD - 1:
        assert set(masks(model)) == {"2"}
    dist.barrier()


@checks
def rank_0_draws_as_a_lone_process_does() -> None:
    """A world of one, and no process group at all, have the usual draws."""
    model = dropfx.compile(mlp(48, UNITS, 8), min_speedup=0)
    here = masks(model)["2"]
    first = gathered(here)[0]
    rank = dist.get_rank()
    dist.destroy_process_group()
    alone = masks(model)["2"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert torch.equal(alone, first)
    assert torch.equal(masks(model)["2"], first)
    assert torch.equal(here, first) == (rank == 0)
