"""What the demo and the benchmarks share of a plain PyTorch training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropfx.bench.datasets import Split

LEARNING_RATE = 0.01
MOMENTUM = 0.9


def mlp(sizes: Sequence[int], rate: float | None) -> nn.Sequential:
    """Linear layers of `sizes` (input, hidden..., classes), between them ReLU and, unless `rate` is None, dropout."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        if rate is not None:
            layers.append(nn.Dropout(rate))
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the founding paper's MLP experiments: SGD, learning rate .01, momentum .9."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


def train_step(
    model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Tensor:
    """One whole training step: forward, cross-entropy, backward, update. Returns the loss, detached."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(images), labels)
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()


def batches(split: Split, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of full batches in the generator's order; all samples at once where they are fewer than `size`."""
    order = torch.randperm(len(split), generator=generator)
    size = min(size, len(split))
    for start in range(0, len(split) - size + 1, size):
        chosen = order[start : start + size]
        yield split.images[chosen], split.labels[chosen]


def evaluate(model: nn.Module, split: Split, size: int = 1000) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0..1) in eval mode; leaves the model in training mode."""
    loss = 0.0
    correct = 0
    model.eval()
    with torch.no_grad():
        for images, labels in zip(split.images.split(size), split.labels.split(size), strict=True):
            outputs = model(images)
            loss += F.cross_entropy(outputs, labels, reduction="sum").item()
            correct += int((outputs.argmax(1) == labels).sum())
    model.train()
    return loss / len(split), correct / len(split)
