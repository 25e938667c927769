"""Real images for the examples: the embedded MNIST-5k, or a folder of idx files (Fashion-MNIST's or torchvision's)."""

import torch

from dropfx.bench import datasets


def load(folder: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images float32 [n, 784] and labels int64 [n], test images and labels."""
    data = datasets.load(folder)
    return data.train.images, data.train.labels, data.test.images, data.test.labels
