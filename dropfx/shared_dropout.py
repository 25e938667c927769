"""Dropout by a mask that several positions share, as one function: what models write as a chain of operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def shared_dropout(input: Tensor, p: float, shared: tuple[bool, ...]) -> Tensor:
    """input * mask, the mask drawn as the model's own chain does: new_empty > bernoulli_ > div_.

    Args:
        p: the drop rate.
        shared: of each axis, whether all its positions share the mask.
    """
    if has_torch_function_unary(input):  # `dropfx.disabled` turns it off, as it does any dropout
        return handle_torch_function(shared_dropout, (input,), input, p, shared)
    sizes = [1 if same else size for same, size in zip(shared, input.shape, strict=True)]
    mask = torch.empty(sizes, dtype=input.dtype, device=input.device).bernoulli_(1 - p).div_(1 - p)
    return input * mask
