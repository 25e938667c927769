"""Steps of training on several ranks, against one process that sees the whole batch.

Each rank has its rows and its masks. The oracle multiplies each row by the masks of its rank; the mean of the ranks'
gradients is that of the summed loss divided by their number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.catalogue.case import recording
from tests.distributed.harness import WORLD
from tests.oracle import comparison, oracle

ROWS, WIDTH, CLASSES = 4, 48, 8
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "module.")


class Block(nn.Module):
    """Residual feed-forward with two sites."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 128), nn.Linear(128, width)
        self.drop, self.out = nn.Dropout(0.5), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.down(self.drop(torch.tanh(self.up(self.norm(x))))))


class Net(nn.Module):
    """Two blocks, and a site between them and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head, self.drop = nn.Linear(WIDTH, 64), nn.Linear(64, CLASSES), nn.Dropout(0.5)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x))


SITES = {"blocks.0.drop", "blocks.0.out", "blocks.1.drop", "blocks.1.out", "drop"}


def make(build: Callable[[], nn.Module] = Net, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same weights on all ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build().to(dtype).train()


def batch(*between: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and cotangents of all ranks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (ROWS * WORLD, *between, WIDTH), (ROWS * WORLD, *between, CLASSES)
    x, cotangent = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, cotangent


def mine(whole: Tensor) -> Tensor:
    """The rows of this rank."""
    return whole.chunk(WORLD)[dist.get_rank()].clone()


def plain(name: str) -> str:
    """The name in the model without its wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {plain(name): whole(parameter.grad) for name, parameter in model.named_parameters()}


def forward_backward(
    model: nn.Module, data: tuple[Tensor, Tensor], seed: int = 0
) -> tuple[Tensor, Tensor, oracle.Masks]:
    """This rank's part of a step, all ranks seeded alike: output, gradient of the input, recorded masks."""
    x, cotangent = (mine(part) for part in data)
    x.requires_grad_()
    torch.manual_seed(seed)
    with recording() as masks:
        y = model(x)
        (y * cotangent.to(y.dtype)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, {plain(name): mask for name, mask in masks.items()}


def masks_of_all(masks: oracle.Masks, like: Tensor) -> oracle.Masks:
    """Each site's multiplier for the rows of all ranks; the ranks drew apart."""
    every: list[Any] = [None] * WORLD
    dist.all_gather_object(every, masks)
    assert all(list(other) == list(masks) for other in every)
    ones = [1] * (like.dim() - 1)
    joined, apart = {}, False
    for name in masks:
        parts = [other[name] for other in every]
        apart |= not all(torch.equal(parts[0], part) for part in parts[1:])
        joined[name] = torch.cat([part.expand(torch.broadcast_shapes(part.shape, (ROWS, *ones))) for part in parts])
    assert apart or not masks, "all ranks drew the same masks"
    return joined


def check_step(
    original: nn.Module, model: nn.Module, *, sites: set[str] = SITES, between: tuple[int, ...] = (), seed: int = 0
) -> None:
    """A step on all ranks against the oracle's on the concatenated batch."""
    check_steps(original, model, [contextlib.nullcontext], sites=sites, between=between, seed=seed)


def check_steps(
    original: nn.Module,
    model: nn.Module,
    around: Sequence[Callable[[], contextlib.AbstractContextManager[Any]]],
    *,
    sites: set[str] = SITES,
    between: tuple[int, ...] = (),
    seed: int = 0,
) -> None:
    """Micro-batches, each in its context, whose gradients add up."""
    if leave_to_python(model):
        original.drop.p = model.drop.p = 0.0
        sites = sites - {"drop"}
    model.zero_grad()
    original.zero_grad()
    for number, context in enumerate(around):
        data = batch(*between, seed=seed + number)
        with context():
            y, x_grad, masks = forward_backward(model, data, seed=seed + number)
        assert set(masks) == sites, f"recorded {sorted(masks)}"
        x = data[0].clone().requires_grad_()
        with oracle.replaced_dropout(original, masks_of_all(masks, x)):
            expected = original(x)
        ((expected * data[1]).sum() / WORLD).backward()
        assert x.grad is not None
        same({"output": y, "input": x_grad}, {"output": mine(expected.detach()), "input": mine(x.grad) * WORLD})
    same(gradients(model), gradients(original))


def leave_to_python(model: nn.Module) -> bool:
    """Whether Dynamo leaves the model's own forward to Python: hooks of the blocks end a graph within a loop."""
    return any(isinstance(block, FSDPModule) for block in getattr(model, "blocks", ()))


def same(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-10) -> None:
    """All tensors agree, and are exactly zero where all ranks dropped."""
    problems = list(comparison.differences(actual, expected, tolerance))
    for name, want in expected.items():
        problems += [f" {name}: {line}" for line in comparison.missing_zeros(actual[name], want)]
    assert not problems, "\n".join(problems)


def train(original: nn.Module, model: nn.Module, steps: int = 3, **options: Any) -> None:
    """Checked steps with an optimizer between them; the original follows, so that rounding does not add up."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(steps):
        check_step(original, model, seed=10 * step, **options)
        optimizer.step()
        with torch.no_grad():
            for parameter, follower in zip(model.parameters(), original.parameters(), strict=True):
                follower.copy_(whole(parameter))
    assert_ranks_agree(original)


def assert_ranks_agree(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        other = parameter.detach().clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, parameter), name


@contextlib.contextmanager
def masked(model: nn.Module, masks: oracle.Masks) -> Iterator[None]:
    """The forwards of a wrapped original multiply by this rank's masks."""
    with oracle.replaced_dropout(model, masks):
        yield
