"""Dropout by a mask that several positions share, as one function: what models write as a chain of operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def shared_dropout(input: Tensor, p: float, shared: tuple[bool, ...], filled: bool = False) -> Tensor:
    """input * mask, the mask drawn as the model's own chain does: new_empty > bernoulli_ > div_.

    Args:
        p: the drop rate.
        shared: of each axis, whether all its positions share the mask.
        filled: the model draws from a tensor of probabilities, full > bernoulli > div, which takes other random
            numbers.
    """
    if has_torch_function_unary(input):  # `dropfx.disabled` turns it off, as it does any dropout
        return handle_torch_function(shared_dropout, (input,), input, p, shared, filled)
    sizes = [1 if same else size for same, size in zip(shared, input.shape, strict=True)]
    memory = torch.empty(sizes, dtype=input.dtype, device=input.device)
    drawn = torch.bernoulli(memory.fill_(1 - p)) if filled else memory.bernoulli_(1 - p)
    return input * drawn.div_(1 - p)
