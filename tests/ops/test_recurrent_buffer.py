"""Weights of a recurrent layer in one piece of memory, as ATen's cudnn/RNN.cpp asks for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dropfx.ops import in_one_buffer


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"proj_size": 3}, {"proj_size": 3, "bias": False}], ids=str)
def test_one_behind_the_other_with_room_for_biases(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    if "proj_size" in options and kind is not nn.LSTM:
        pytest.skip("only an LSTM has one")
    weights = list(kind(5, 4, **options).parameters())
    made = in_one_buffer(weights)
    assert len(made) == len(weights)
    place = 0
    for ours, given in zip(made, weights, strict=True):
        assert torch.equal(ours, given)
        assert ours.is_contiguous()
        assert ours.storage_offset() == place
        place += given.numel()
    (storage,) = {each.untyped_storage().data_ptr() for each in made}
    assert storage == made[0].data_ptr()
    room = 2 * weights[0].size(0) if "bias" in options else 0
    assert made[0].untyped_storage().nbytes() == (place + room) * made[0].element_size()


def test_gradients_go_back_to_each_weight() -> None:
    weights = list(nn.LSTM(5, 4, bias=False).parameters())
    factors = [torch.randn_like(weight) for weight in weights]
    made = in_one_buffer(weights)
    grads = torch.autograd.grad(sum((m * f).sum() for m, f in zip(made, factors, strict=True)), weights)
    for grad, factor in zip(grads, factors, strict=True):
        assert torch.equal(grad, factor)
