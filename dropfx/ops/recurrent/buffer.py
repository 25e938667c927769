"""Weights one behind the other in memory, as cuDNN wants them: else it copies them itself, with a warning."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def in_one_buffer(weights: list[Tensor]) -> list[Tensor]:
    """The same values as views of one tensor."""
    flat = torch.cat([weight.reshape(-1) for weight in weights])
    parts = flat.split([math.prod(weight.shape) for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
