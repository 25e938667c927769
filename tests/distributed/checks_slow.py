"""What takes long: Inductor, and further inner compilers and patterns."""

from __future__ import annotations

import torch
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.checks_dynamo import block_by_block, check_blocks, check_cut, options
from tests.distributed.checks_fsdp import compiled, shard_blocks
from tests.distributed.checks_tensor_parallel import check_under_dynamo
from tests.distributed.harness import WORLD, Checks
from tests.distributed.steps import SITES, batch, forward_backward, gradients, make, masks_of_all, same, train
from tests.oracle import oracle

checks = Checks()


@checks
def cut_at_buckets_by_every_inner_compiler() -> None:
    for inner, pattern in (("eager", "block"), ("eager", "row"), ("aot_eager", "slice"), ("inductor", "block")):
        torch._dynamo.reset()
        check_cut(inner, pattern=pattern)


@checks
def wrapped_after_compilation() -> None:
    train(make(), DistributedDataParallel(torch.compile(make(), **options())), steps=2)


@checks
def sharded() -> None:
    train(make(), torch.compile(fully_shard(make()), **options("eager")), steps=2)
    torch._dynamo.reset()
    check_blocks(block_by_block("aot_eager"))


@checks
def shards_of_every_pattern() -> None:
    for pattern in ({"pattern": "slice"}, {"pattern": "row"}, {"groups": 2}):
        train(make(), shard_blocks(compiled(make(), **pattern)), steps=2, between=(3,))


@checks
def replicated() -> None:
    """The sibling of fully_shard that shards nothing."""
    model = compiled(make())
    replicate(model, mesh=init_device_mesh("cpu", (WORLD,)))
    train(make(), model, steps=2)


@checks
def first_fsdp() -> None:
    """The wrapper that FSDP2 replaces."""
    original, data = make(), batch()
    model = FullyShardedDataParallel(compiled(make()), use_orig_params=True, device_id=torch.device("cpu"))
    _, _, masks = forward_backward(model, data)
    assert set(masks) == SITES
    with oracle.replaced_dropout(original, masks_of_all(masks, data[0])):
        ((original(data[0]) * data[1]).sum() / WORLD).backward()
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        found = {name.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for name, p in model.named_parameters()}
    same(found, gradients(original))


@checks
def inductor_in_one_bucket() -> None:
    train(make(), torch.compile(DistributedDataParallel(make()), **options("inductor")), steps=2)


@checks
def inductor_with_shards() -> None:
    train(make(), torch.compile(fully_shard(make()), **options("inductor")), steps=2)
    torch._dynamo.reset()
    check_blocks(block_by_block("inductor"))


@checks
def tensor_parallel() -> None:
    check_under_dynamo("aot_eager")
