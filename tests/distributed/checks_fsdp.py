"""FSDP2: fully_shard of a compiled model, of its blocks, before and after dropfx.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import dropfx
from dropfx.draws.runtime import shared
from dropfx.ops import linear
from tests.distributed import steps
from tests.distributed.checks_ddp import Checkpointed, forward_backward_once
from tests.distributed.harness import WORLD, Checks
from tests.distributed.steps import Block, Net, batch, forward_backward, gradients, make, mine, same, train
from tests.oracle import oracle

checks = Checks()


def shard_root(model: nn.Module, **options: Any) -> nn.Module:
    return fully_shard(model, **options)


def shard_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """The blocks and the rest, as one does."""
    for part in model.modules():
        if isinstance(part, Block):
            fully_shard(part, **options)
    return fully_shard(model, **options)


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    return dropfx.compile(model, min_speedup=0, **options)


SHARDINGS = (shard_root, shard_blocks)


@checks
def compiled_then_sharded() -> None:
    for shard in SHARDINGS:
        model = shard(compiled(make()))
        assert isinstance(model, FSDPModule)
        assert isinstance(model, Net)
        forward_backward(model, batch())
        traces = shared.rewritten
        train(make(), model)
        assert shared.rewritten == traces


@checks
def sharded_then_compiled() -> None:
    for shard in SHARDINGS:
        train(make(), compiled(shard(make())), steps=2)


@checks
def run_before_it_is_sharded() -> None:
    """What was traced without shards does not serve with them."""
    for shard in SHARDINGS:
        model = compiled(make(), example_inputs=batch()[0])
        forward_backward(model, batch())
        train(make(), shard(model), steps=2)


@checks
def when_parameters_are_freed() -> None:
    for reshard in (True, False):
        train(make(), shard_blocks(compiled(make()), reshard_after_forward=reshard), steps=2)


@checks
def weights_are_gathered_again_when_parameters_were_freed() -> None:
    with mock.patch.object(linear, "worth_gathering_again", return_value=True) as asked:
        for shard in SHARDINGS:
            train(make(), compiled(shard(make(), reshard_after_forward=True)), steps=2)
    assert asked.called


@checks
def hybrid_sharding() -> None:
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    train(make(), shard_blocks(compiled(make()), mesh=mesh), steps=2)


def shard_linears(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if type(part) is nn.Linear:
            fully_shard(part)
    return fully_shard(model)


@checks
def linears_with_shards_of_their_own() -> None:
    """Their hooks must run, so that they stay calls: nothing around them is rewritten, and nothing is wrong."""
    original, model = make(), shard_linears(compiled(make()))
    assert not forward_backward(model, batch())[2]
    model.zero_grad()
    for part in (*original.modules(), *model.modules()):
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    forward_backward(model, batch())
    original(batch()[0]).mul(batch()[1]).sum().div(WORLD).backward()
    same(gradients(model), gradients(original))


@checks
def blocks_that_share_a_group() -> None:
    model = compiled(make())
    fully_shard(list(model.blocks))
    train(make(), fully_shard(model), steps=2)


def frozen(model: nn.Module) -> nn.Module:
    for parameter in (*model.blocks[0].parameters(), model.head.bias):
        parameter.requires_grad_(False)
    return model


@checks
def frozen_parameters() -> None:
    for shard in SHARDINGS:
        steps.check_step(frozen(make()), shard(compiled(frozen(make()))))


@checks
def the_output_may_be_changed_in_place() -> None:
    """FSDP2's hook on it survives, which it would not on a view."""
    model, original = shard_root(compiled(make())), make()
    x, cotangent = batch()
    torch.manual_seed(0)
    with steps.recording() as masks:
        y = model(mine(x))
    y.mul_(mine(cotangent)).sum().backward()
    with oracle.replaced_dropout(original, steps.masks_of_all(masks, x)):
        (original(x) * cotangent).sum().div(WORLD).backward()
    same(gradients(model), gradients(original))


@checks
def gradients_accumulate_without_synchronisation() -> None:
    model = shard_blocks(compiled(make()))

    def part(last: bool) -> Any:
        model.set_requires_gradient_sync(last)
        return steps.contextlib.nullcontext()

    for step in range(2):
        around: list[Callable[[], Any]] = [lambda: part(False), lambda: part(False), lambda: part(True)]
        steps.check_steps(make(), model, around, seed=10 * step)


@checks
def mixed_precision() -> None:
    """Against the same sharding of the original in the same policy: bf16 rounds alike up to some units."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    inner = MixedPrecisionPolicy(torch.bfloat16, torch.float32)

    def shard(model: nn.Module) -> nn.Module:
        for block in model.blocks:
            fully_shard(block, mp_policy=inner)
        return fully_shard(model, mp_policy=policy)

    original, model = shard(make(dtype=torch.float32)), shard(compiled(make(dtype=torch.float32)))
    original.drop.p = model.drop.p = 0.0
    x, cotangent = (mine(part).float() for part in batch())
    for seed in range(2):
        model.zero_grad(), original.zero_grad()
        torch.manual_seed(seed)
        with steps.recording() as masks:
            y = model(x)
        assert set(masks) == steps.SITES - {"drop"}  # of the forward that loops over sharded blocks
        assert {mask.dtype for mask in masks.values()} == {torch.bfloat16}
        (y * cotangent).sum().backward()
        expected = masked_forward(original, masks, x)
        assert y.dtype == expected.dtype == torch.float32
        (expected * cotangent).sum().backward()
        same({"output": y.detach()}, {"output": expected.detach()}, 5e-2)
        same(gradients(model), gradients(original), 5e-2)


def masked_forward(model: nn.Module, masks: oracle.Masks, x: Tensor) -> Tensor:
    with steps.masked(model, masks):
        return model(x)


@checks
def activation_checkpointing() -> None:
    """In the model's own forward, and by PyTorch's wrapper, inside of what is sharded."""

    def wrapped() -> nn.Module:
        model = make()
        apply_activation_checkpointing(model, check_fn=lambda part: isinstance(part, Block))
        return model

    sites = steps.SITES - {"drop"}
    for build in (lambda: make(Checkpointed), wrapped):
        model, data = shard_blocks(compiled(build())), batch()
        model.drop.p = 0.0
        for seed in range(2):
            model.zero_grad()
            y, _, masks = forward_backward_once(model, data, seed)
            assert set(masks) == sites, sorted(masks)
            original = make()
            original.drop.p = 0.0
            with oracle.replaced_dropout(original, steps.masks_of_all(masks, data[0])):
                expected = original(data[0])
            (expected * data[1]).sum().div(WORLD).backward()
            same({"output": y}, {"output": mine(expected.detach())})
            same(gradients(model), gradients(original))


@checks
def checkpoints_of_weights_load_across() -> None:
    """DDP's or a plain model's -> FSDP2 compiled -> a plain model; the optimizer's state too."""
    full = StateDictOptions(full_state_dict=True)
    source = make()
    for parameter in source.parameters():
        parameter.data += 0.01
    with torch.random.fork_rng():
        model = shard_blocks(compiled(Net().double()))
    set_model_state_dict(model, dict(source.state_dict()), options=full)
    train(source, model, steps=2)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    states = [get_model_state_dict(shards, options=full) for shards in (model, shard_blocks(make()))]
    assert list(states[0]) == list(states[1]) == list(source.state_dict())
    assert get_optimizer_state_dict(model, optimizer, options=full).keys() == {"state", "param_groups"}
    target = Net().double()
    target.load_state_dict(states[0], strict=True)
    expected = {name: steps.whole(parameter) for name, parameter in model.named_parameters()}
    same({name: parameter.detach() for name, parameter in target.named_parameters()}, expected)


@checks
def weights_that_come_after_sharding() -> None:
    """The model is made without memory, compiled, sharded, and filled at last."""
    with torch.device("meta"):
        model = compiled(Net().double())
    shard_blocks(model).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, dict(make().state_dict()), options=options)
    train(make(), model, steps=2)


@checks
def restored_or_compiled_anew_it_stays_sharded() -> None:
    for shard in SHARDINGS:
        model = shard(compiled(make()))
        forward_backward(model, batch())
        compiled(model, pattern="slice")
        train(make(), model, steps=1)
        dropfx.restore(model)
        assert isinstance(model, FSDPModule)
        assert not any(issubclass(type(part), dropfx.frontend.swapped_class.Compiled) for part in model.modules())
        assert not any("_dropfx" in part.__dict__ for part in model.modules())
        model.set_requires_gradient_sync(True)
        x, copy = mine(batch()[0]), plain_copy(model)
        copy.drop.p = model.drop.p
        torch.manual_seed(3)
        got = model(x)
        torch.manual_seed(3)
        assert torch.equal(got, copy(x))


def plain_copy(model: nn.Module) -> nn.Module:
    copy = Net().double()
    copy.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return copy


@checks
def eval_is_untouched() -> None:
    x = mine(batch()[0])
    for shard in SHARDINGS:
        with torch.no_grad():
            assert torch.equal(shard(compiled(make())).eval()(x), shard(make()).eval()(x))


@checks
def hooks_of_the_user_run_once() -> None:
    model, calls = compiled(make()), []
    model.blocks[1].register_forward_hook(lambda part, args, output: calls.append(part))
    shard_blocks(model)
    train(make(), model, steps=2)
    assert len(calls) == 2


@checks
def no_copy_no_trial() -> None:
    """explain, assert_equivalent and example inputs need a copy, which FSDP2 does not have: an error that says so."""
    model, x = shard_root(make()), mine(batch()[0])
    for call in (
        lambda: dropfx.explain(model, x),
        lambda: dropfx.compile(model, example_inputs=x),
        lambda: dropfx.testing.assert_equivalent(model, x),
    ):
        try:
            call()
        except dropfx.DropfxError as error:
            assert isinstance(error, TypeError)  # noqa: PT017
            assert "FSDP" in str(error)  # noqa: PT017
        else:
            raise AssertionError("it was copied")
    assert not any("_dropfx" in part.__dict__ for part in model.modules())
    dist.barrier()
