"""`torch.compile(model, backend="dropfx")` with DDP, whose buckets cut the graph, and with FSDP2."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dropfx
from tests.distributed import steps
from tests.distributed.harness import Checks
from tests.distributed.steps import batch, make, train
from tests.oracle import oracle

checks = Checks()


def options(inner: str = "aot_eager", **more: Any) -> dict[str, Any]:
    return {"backend": "dropfx", "options": {"inner": inner, "min_speedup": 0, **more}}


def small_buckets() -> Any:
    """DDP's first bucket is of a megabyte, more than these models have; Dynamo cuts at a bucket's end."""
    return mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 20_000)


@checks
def in_one_bucket() -> None:
    train(make(), torch.compile(DistributedDataParallel(make()), **options("eager")), steps=2)


@checks
def cut_at_buckets() -> None:
    """Each part draws on its own; a part's compilation, which runs on fakes, neither draws nor records."""
    check_cut("aot_eager")


def check_cut(inner: str, steps: int = 2, **more: Any) -> None:
    with small_buckets():
        model = DistributedDataParallel(make(), bucket_cap_mb=0.05)
        train(make(), torch.compile(model, **options(inner, **more)), steps=steps)


@checks
def cut_at_buckets_with_draws_of_varying_size() -> None:
    with mock.patch.object(torch._dynamo.config, "error_on_recompile", True):
        check_cut("aot_eager", steps=3, pattern="row")


@checks
def compilation_leaves_the_generator_alone() -> None:
    """The first step, which compiles, draws as a later one does."""
    with small_buckets():
        model = torch.compile(DistributedDataParallel(make(), bucket_cap_mb=0.05), **options())
        found = [steps.forward_backward(model, batch(), seed=4)[2] for _ in range(2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in steps.SITES)


@checks
def sharded_root() -> None:
    train(make(), torch.compile(fully_shard(make()), **options()), steps=2)


def block_by_block(inner: str) -> nn.Module:
    model = make()
    for block in model.blocks:
        block.compile(**options(inner))
        fully_shard(block)
    return fully_shard(model)


@checks
def blocks_sharded_then_the_whole_compiled() -> None:
    """FSDP2's hooks break the graph around each block; Dynamo leaves a forward with a break in a loop to Python."""
    model = make()
    for block in model.blocks:
        fully_shard(block)
    check_blocks(torch.compile(fully_shard(model), **options()))


def check_blocks(model: nn.Module) -> None:
    """A graph a block, in which the sites bear the block's own names for them; the one outside of blocks is off."""
    original = make()
    original.drop.p = model.drop.p = 0.0
    for seed in range(2):
        model.zero_grad(), original.zero_grad()
        data = batch(seed=seed)
        x, cotangent = map(steps.mine, data)
        torch.manual_seed(seed)
        with dropfx.testing.record() as recorded:
            y = model(x)
        (y * cotangent).sum().backward()
        masks: oracle.Masks = {}
        for number, found in enumerate(recorded):
            masks |= {f"blocks.{number}.{name}": mask for name, mask in found.items()}
        assert set(masks) == steps.SITES - {"drop"}, [sorted(found) for found in recorded]
        with oracle.replaced_dropout(original, steps.masks_of_all(masks, data[0])):
            expected = original(data[0])
        ((expected * data[1]).sum() / steps.WORLD).backward()
        steps.same({"output": y.detach()}, {"output": steps.mine(expected.detach())})
        steps.same(steps.gradients(model), steps.gradients(original))
