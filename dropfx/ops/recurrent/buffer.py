"""Weights one after another in memory, as cuDNN wants them: else PyTorch copies them at every call, with a warning.

What is asked (ATen's cudnn/RNN.cpp, `try_get_weight_buf`): each weight lies where cuDNN expects it, and the memory is
as long as cuDNN's own, which has room for two biases even where a layer has none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def in_one_buffer(weights: list[Tensor]) -> list[Tensor]:
    """The same values as views of one tensor.

    Args:
        weights: of one layer: W_ih [G*H, K], W_hh, then both biases or none, then the projection or none.
    """
    biased = len(weights) > 3
    room = [] if biased else [weights[0].new_zeros(2 * weights[0].size(0))]
    flat = torch.cat([*(weight.reshape(-1) for weight in weights), *room])
    return [part.view(weight.shape) for part, weight in zip(flat.split(_lengths(weights, room)), weights, strict=False)]


def _lengths(*lists: list[Tensor]) -> list[int]:
    return [math.prod(tensor.shape) for tensors in lists for tensor in tensors]
