"""DistributedDataParallel around a compiled model."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dropfx
from tests.distributed import steps
from tests.distributed.harness import WORLD, Checks
from tests.distributed.steps import Block, Net, batch, check_steps, forward_backward, gradients, make, mine, same, train

checks = Checks()


def ddp(model: nn.Module, options: dict[str, Any] | None = None, **wrapper: Any) -> nn.Module:
    return DistributedDataParallel(dropfx.compile(model, min_speedup=0, **(options or {})), **wrapper)


@checks
def options_of_ddp() -> None:
    for wrapper in (
        {},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
        {"bucket_cap_mb": 0.01},
    ):
        train(make(), ddp(make(), **wrapper))


@checks
def patterns() -> None:
    for options in ({"pattern": "slice"}, {"pattern": "row"}, {"groups": 2}):
        train(make(), ddp(make(), options), steps=2, between=(3,))


@checks
def tiles_of_weights() -> None:
    """The weights that ranks multiply by differ: the reference is the mean of what each rank finds alone."""
    alone, wrapped = dropfx.compile(make(), pattern="tile", min_speedup=0), ddp(make(), {"pattern": "tile"})
    _, _, masks = forward_backward(alone, batch())
    assert masks
    for parameter in alone.parameters():
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= WORLD
    forward_backward(wrapped, batch())
    same(gradients(wrapped), gradients(alone))


@checks
def gradients_accumulate_without_synchronisation() -> None:
    model = ddp(make())
    for step in range(2):
        around = [model.no_sync, model.no_sync, contextlib.nullcontext]
        check_steps(make(), model, around, seed=10 * step)


class Branches(nn.Module):
    """A rank may take another branch than its peers; nobody takes the third."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Net() for _ in range(3))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.branches[which](x)


@checks
def unused_parameters() -> None:
    original, model = make(Branches), ddp(make(Branches), find_unused_parameters=True)
    rank = torch.distributed.get_rank()
    for seed in range(2):
        x, cotangent = map(mine, batch(seed=seed))
        model.zero_grad(), original.zero_grad()
        torch.manual_seed(seed)
        with steps.recording() as masks:
            y = model(x, rank)
        (y * cotangent).sum().backward()
        assert set(masks) == {f"branches.{rank}.{site}" for site in steps.SITES}
        with steps.masked(original, masks):
            ((original(x, rank) * cotangent).sum() / WORLD).backward()
        for parameter in original.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.distributed.all_reduce(parameter.grad)
        found = gradients(model)
        unused = [name for name, gradient in found.items() if gradient is None]
        assert unused == [name for name in found if name.startswith("branches.2.")]
        expected = {name: value for name, value in gradients(original).items() if name not in unused}
        same({name: value for name, value in found.items() if name not in unused}, expected)


class Checkpointed(Net):
    """Recomputes its blocks in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return self.head(self.drop(x))


@checks
def activation_checkpointing() -> None:
    """The root runs as written, its blocks are compiled on their own, and the second forward draws as the first."""
    blocks = steps.SITES - {"drop"}
    model = ddp(make(Checkpointed), static_graph=True)
    data = batch()
    for seed in range(2):
        model.zero_grad()
        torch.manual_seed(seed)
        y, _, masks = forward_backward_once(model, data, seed)
        assert set(masks) == blocks
        original = make(Checkpointed)
        original.drop.p = 0.0
        with steps.oracle.replaced_dropout(original, steps.masks_of_all(masks, data[0])):
            expected = original(data[0])
        (expected * data[1]).sum().div(WORLD).backward()
        same({"output": y}, {"output": mine(expected.detach())})
        same(gradients(model), gradients(original))


def forward_backward_once(model: nn.Module, data: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, None, Any]:
    """As forward_backward, recording the forward alone: the backward runs the blocks again."""
    for part in model.modules():
        if isinstance(part, Checkpointed):
            part.drop.p = 0.0  # left to PyTorch, which draws otherwise than the oracle
    x, cotangent = map(mine, data)
    torch.manual_seed(seed)
    with steps.recording() as masks:
        y = model(x)
    masks = {steps.plain(name): mask for name, mask in masks.items()}
    (y * cotangent).sum().backward()
    return y.detach(), None, masks


class Normalised(nn.Module):
    """Its batch statistics are a rank's own, its buffers those of rank 0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.block = nn.Linear(steps.WIDTH, 64), nn.BatchNorm1d(64), Block()
        self.head = nn.Linear(64, steps.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.norm(self.inner(x))))


@checks
def buffers_are_those_of_the_first_rank() -> None:
    original, model = DistributedDataParallel(make(Normalised)), ddp(make(Normalised))
    for seed in range(3):
        model.zero_grad(), original.zero_grad()
        y, x_grad, masks = forward_backward(model, batch(seed=seed), seed)
        assert set(masks) == {"block.drop", "block.out"}
        with steps.masked(original.module, masks):
            x, cotangent = map(mine, batch(seed=seed))
            expected = original(x.requires_grad_())
            (expected * cotangent).sum().backward()
        same({"output": y, "input": x_grad}, {"output": expected.detach(), "input": x.grad})
        same(gradients(model), gradients(original))
        same(dict(model.named_buffers()), dict(original.named_buffers()))


@checks
def checkpoints_of_weights_load_across() -> None:
    """A compiled model in DDP -> a plain one -> a compiled one."""
    model = ddp(make())
    train(make(), model, steps=1)
    plain = Net().double()
    plain.load_state_dict(model.module.state_dict(), strict=True)
    other = ddp(Net().double())
    other.load_state_dict({f"module.{name}": value for name, value in plain.state_dict().items()}, strict=True)
    train(plain, other, steps=1)


@checks
def compiled_inside_of_the_wrapper() -> None:
    """dropfx.compile(ddp.module), after a first step without it."""
    model = DistributedDataParallel(make())
    forward_backward(model, batch())
    dropfx.compile(model.module, min_speedup=0)
    train(make(), model, steps=2)
    dropfx.restore(model.module)
    assert not forward_backward(model, batch())[2]


@checks
def traced_before_it_is_wrapped() -> None:
    train(make(), ddp(make(), {"example_inputs": mine(batch()[0])}), steps=2)


@checks
def eval_is_untouched() -> None:
    model, original = ddp(make()).eval(), make().eval()
    x = mine(batch()[0])
    with torch.no_grad():
        assert torch.equal(model(x), original(x))
