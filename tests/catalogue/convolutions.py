"""Dropout of channels, and before convolutions of 1x1: what is cut is the convolutions' channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.catalogue.case import case, vectors


def images(*shape: int) -> Any:
    return lambda batch, draw: (draw(batch, *shape),)


@case("conv_between", images(3, 8, 8), rewritten=("3", "7"))
def conv_between() -> nn.Module:
    """Between two sites a convolution is compact on both sides; pooling and activations keep channels apart."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.5),
        nn.Conv2d(32, 64, 3, padding="same", bias=False),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Dropout2d(0.25),
        nn.Conv2d(64, 8, 3, dilation=1, stride=2),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@case("conv_to_linear", images(3, 8, 8), rewritten=("2",))
def conv_to_linear() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Dropout2d(0.5), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(576, 8)
    )


@case("conv1d_between", vectors(16, 32), rewritten=("1",))
def conv1d_between() -> nn.Module:
    return nn.Sequential(nn.Conv1d(32, 64, 5), nn.Dropout1d(0.5), nn.Conv1d(64, 8, 3))


@case("conv3d_between", images(2, 4, 4, 4), rewritten=("1",))
def conv3d_between() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 32, 3, padding=1), nn.Dropout3d(0.5), nn.Conv3d(32, 8, 3))


@case("conv_depthwise", images(8, 6, 6), rewritten=("3",))
def conv_depthwise() -> nn.Module:
    """Filters of kept channels alone, on either side."""
    return nn.Sequential(
        nn.Conv2d(8, 32, 1),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.SiLU(),
        nn.Dropout2d(0.5),
        nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False),
        nn.Conv2d(32, 8, 1),
    )


@case("conv_depthwise_bias", images(8, 6, 6), rewritten=("1",))
def conv_depthwise_bias() -> nn.Module:
    """Behind the site a bias is not zero at dropped channels."""
    return nn.Sequential(nn.Conv2d(8, 32, 1), nn.Dropout2d(0.5), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 8, 1))


@case("conv_grouped", images(8, 6, 6), left=("1",))
def conv_grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, groups=2), nn.Dropout2d(0.5), nn.Conv2d(32, 8, 3, groups=4), nn.Flatten(), nn.Linear(32, 4)
    )


@case("conv_transposed", images(8, 4, 4), left=("1",))
def conv_transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(8, 32, 3), nn.Dropout2d(0.5), nn.ConvTranspose2d(32, 8, 3))


@case("conv_batch_norm", images(3, 6, 6), left=("1",))
def conv_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.Dropout2d(0.5), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3))


@case("conv_1x1", images(8, 4, 4), rewritten=("2",))
def conv_1x1() -> nn.Module:
    """The channels are what single elements are dropped of."""
    return nn.Sequential(nn.Conv2d(8, 64, 1), nn.GELU(), nn.Dropout(0.5), nn.Conv2d(64, 8, 1))


@case("vgg_head", images(8, 4, 4), rewritten=("2",), optional=("5",))
def vgg_head() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 96, 4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(96, 64, 1),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 8),
    )


@case("conv_3x3_elements", images(8, 6, 6), optional=("1",))
def conv_3x3_elements() -> nn.Module:
    """Elements before a convolution over positions are no channels."""
    return nn.Sequential(nn.Conv2d(8, 32, 3), nn.Dropout(0.5), nn.Conv2d(32, 8, 3))


@case("conv_residual", images(32, 6, 6), rewritten=("drop",))
class ConvResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.relu(self.up(x))))


@case("conv_mask_by_hand", images(8, 6, 6), rewritten=(":bernoulli_1",))
class ConvMaskByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(8, 64, 3), nn.Conv2d(64, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        mask = h.new_empty(h.size(0), h.size(1), 1, 1).bernoulli_(0.5).div_(0.5)
        return self.down(h * mask)


@case("conv_channels_last", images(8, 6, 6), rewritten=("drop",))
class ConvChannelsLast(nn.Module):
    """Views behind it rely on the layout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(8, 64, 3), nn.Conv2d(64, 32, 3)
        self.drop, self.head = nn.Dropout2d(0.5), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.up(x.contiguous(memory_format=torch.channels_last)))
        return self.head(self.down(h).permute(0, 2, 3, 1).view(-1, 32)) + h.permute(0, 2, 3, 1).view(-1).sum()
