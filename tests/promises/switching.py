"""What the tests of live switches share: a pair of models, and the sites that dropped anything in a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.catalogue import CASES
from tests.catalogue.case import check_step
from tests.oracle import oracle

Models = tuple[nn.Module, nn.Module]  # the original and the compiled model


def example(batch: int = 4, seed: int = 0) -> Tensor:
    return CASES["mlp"].call(batch, torch.float64, seed)[0][0]


def check(models: Models, seed: int = 0) -> oracle.Masks:
    """Promise 2 for one step, and the masks of the sites that dropped anything."""
    masks = check_step(*models, (example(),), dtype=torch.float64, seed=seed)
    return {name: mask for name, mask in masks.items() if not (mask == 1).all()}


def dropped_share(mask: Tensor) -> float:
    return float((mask == 0).double().mean())
