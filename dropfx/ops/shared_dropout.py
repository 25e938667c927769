"""Dropout by a mask that several positions share, as one function: what models write as a chain of operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def shared_dropout(
    input: Tensor, p: float, shared: tuple[bool, ...], filled: bool = False, order: tuple[int, ...] | None = None
) -> Tensor:
    """input * mask, the mask drawn as the model's own chain does: new_empty > bernoulli_ > div_.

    Args:
        p: the drop rate.
        shared: of each axis, whether all its positions share the mask.
        filled: the model draws from a tensor of probabilities, full > bernoulli > div, which takes other random
            numbers.
        order: the mask's axes as they lie in memory, outermost first, where that is not their order: it is drawn so.
    """
    if has_torch_function_unary(input):  # `dropfx.disabled` turns it off, as it does any dropout
        return handle_torch_function(shared_dropout, (input,), input, p, shared, filled, order)
    sizes = [1 if same else size for same, size in zip(shared, input.shape, strict=True)]
    axes = range(input.dim()) if order is None else order
    memory = torch.empty([sizes[axis] for axis in axes], dtype=input.dtype, device=input.device)
    memory = memory.permute([*map(axes.index, range(input.dim()))])
    drawn = torch.bernoulli(memory.fill_(1 - p)) if filled else memory.bernoulli_(1 - p)
    return input * drawn.div_(1 - p)
