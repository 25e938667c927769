"""What a forward may do in Python: branch on random values, switch modes, write attributes, checkpoint."""

from __future__ import annotations

import random
from collections import Counter

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from tests.catalogue.case import case, mlp


class WithMLP(nn.Module):
    """A forward of its own around an MLP that has one site, "mlp.2"."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = mlp(64, 96, 64), nn.Linear(64, 8)


SITE = ("mlp.2",)


@case("no_grad_inside", rewritten=SITE)
class NoGradInside(WithMLP):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = self.head(x)
        return self.head(self.mlp(x)), target


@case("no_grad_around_the_site", rewritten=SITE)
class NoGradAround(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.mlp(x)
        return self.head(features)


@case("no_grad_decorator", rewritten=SITE)
class NoGradDecorator(WithMLP):
    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(self.features(x)) + x)


@case("grad_mode_read", rewritten=SITE)
class GradModeRead(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)
        return self.head(h) if torch.is_grad_enabled() else h


@case("autocast_inside", rewritten=SITE, precision=torch.bfloat16)
class AutocastInside(WithMLP):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(64, 96, 64, activation=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.mlp(x)
        return self.head(h.to(x.dtype))


@case("randn_inside", rewritten=SITE)
class RandnInside(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(x + torch.randn(x.shape[-1], dtype=x.dtype)))


@case("randn_like_inside", rewritten=SITE)
class RandnLikeInside(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(x) + torch.randn_like(x))


@case("inplace_random_inside", rewritten=SITE)
class InplaceRandom(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(x * torch.empty_like(x).uniform_(0.5, 1.5)))


@case("bernoulli_inside", rewritten=SITE)
class BernoulliInside(WithMLP):
    """A dropout written by hand is not a site."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(x * torch.bernoulli(torch.full_like(x, 0.5)) * 2.0))


LAYERS = tuple(f"layers.{i}" for i in range(4))
LAYER_SITES = tuple(f"{layer}.2" for layer in LAYERS)


@case("random_branch", optional=LAYER_SITES)
class RandomBranch(nn.Module):
    """LayerDrop with Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp(64, 96, 64) for _ in range(4))

    def skip(self) -> bool:
        return random.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.skip():
                x = x + layer(x)
        return x


@case("rand_branch", optional=LAYER_SITES)
class RandBranch(RandomBranch):
    """LayerDrop with PyTorch's generator."""

    def skip(self) -> bool:
        return bool(torch.rand([]) < 0.5)


@case("data_branch", rewritten=SITE)
class DataBranch(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)
        return self.head(h) if x.sum() > 0 else self.head(-h)


@case("item", rewritten=SITE)
class Item(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(x)) * x.abs().sum().item()


@case("counter", rewritten=SITE, state=lambda model: model.steps)
class CounterInside(WithMLP):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.head(self.mlp(x)) * self.steps


@case("list_append", rewritten=SITE, state=lambda model: model.seen)
class ListAppend(WithMLP):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[0])
        return self.head(self.mlp(x))


@case("dict_write", rewritten=SITE, state=lambda model: dict(model.seen))
class DictWrite(WithMLP):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.seen["forward"] += 1
        return self.head(self.mlp(x))


@case("activation_cache", rewritten=SITE, state=lambda model: model.last.shape)
class ActivationCache(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.mlp(x)
        return self.head(self.last)


@case("activation_list", rewritten=SITE, state=lambda model: [value.shape for value in model.cache])
class ActivationList(WithMLP):
    def __init__(self) -> None:
        super().__init__()
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)
        self.cache.append(h.detach())
        return self.head(h)


@case("buffer_assigned", rewritten=SITE)
class BufferAssigned(WithMLP):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().sum(0)
        self.steps += 1
        return self.head(self.mlp(x - self.mean))


TALLY: Counter[str] = Counter()


@case("global_write", rewritten=SITE, state=lambda model: None)
class GlobalWrite(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        TALLY[type(self).__name__] += 1
        return self.head(self.mlp(x))


@case("checkpoint", rewritten=SITE)
class Checkpoint(WithMLP):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.utils.checkpoint.checkpoint(self.mlp, x, use_reentrant=self.reentrant))


@case("checkpoint_reentrant", rewritten=SITE)
class CheckpointReentrant(Checkpoint):
    reentrant = True


@case("checkpoint_method", rewritten=SITE)
class CheckpointMethod(WithMLP):
    """What is checkpointed is a method around the child."""

    def part(self, x: Tensor, scale: float) -> Tensor:
        return torch.tanh(self.mlp(x)) * scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.utils.checkpoint.checkpoint(self.part, x, 2.0, use_reentrant=False))


@case("type_of_an_opaque_childs_result", rewritten=SITE)
class TypeOfResult(WithMLP):
    """What the child returns is known only when it runs."""

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return (x.tanh(), x) if x.sum() < 1e9 else x

    def __init__(self) -> None:
        super().__init__()
        self.branch = TypeOfResult.Branch()

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(self.mlp(x))
        return self.head(out[0] if isinstance(out, tuple) else out)


# How many parts there are depends on the batch: what was traced holds for one count only.


class Parts(WithMLP):
    """The forward's Python loop runs once a part."""

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp[1](self.mlp[0](x))
        return torch.cat([self.head(self.mlp[3](self.mlp[2](part))) for part in self.parts(h)])


PARTS = tuple(f"mlp.2#{n}" for n in range(2, 8))


@case("parts_of_the_batch", batches=(4, 7, 3, 7), rewritten=SITE, optional=PARTS)
class SplitParts(Parts):
    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(2)


@case("rows_of_the_batch", batches=(2, 5, 2, 3), rewritten=SITE, optional=PARTS)
class UnbindParts(Parts):
    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.unbind(x[:, None])


@case("chunks_of_the_batch", batches=(4, 6, 5, 8), rewritten=SITE, optional=PARTS)
class ChunkParts(Parts):
    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(4, dim=0)


@case("size_of_a_slice", batches=(4, 6, 3, 6), rewritten=SITE)
class SizeOfSlice(WithMLP):
    """As long as the batch when it is traced, and shorter later."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)[:4]
        return self.head(h.view(h.size(0) * 2, 32).view(h.size(0), -1))
