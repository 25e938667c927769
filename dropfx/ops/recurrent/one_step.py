"""One step of a cell from what its inputs [B, G*H] and its state [B, G*H] add to the gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CELL_FUNCTIONS: dict[Any, str] = {
    torch.lstm_cell: "lstm",
    torch.gru_cell: "gru",
    torch.rnn_tanh_cell: "rnn_tanh",
    torch.rnn_relu_cell: "rnn_relu",
}
"""PyTorch's functions of one step -> kind of cell."""


def cell_of_gates(kind: str, of_input: Tensor, of_state: Tensor, state: Tensor) -> Any:
    """What PyTorch's function computes from its two products, in the same order of operations.

    Args:
        state: h [B, H]; of an LSTM c [B, H].

    Returns:
        The next h; of an LSTM (h, c).
    """
    return _CELLS[kind](of_input, of_state, state)


def _lstm(of_input: Tensor, of_state: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (of_state + of_input).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(of_input: Tensor, of_state: Tensor, h: Tensor) -> Tensor:
    (r, u, n), (state_r, state_u, state_n) = of_input.chunk(3, 1), of_state.chunk(3, 1)
    n = torch.tanh(n + state_n * torch.sigmoid(state_r + r))
    return (h - n) * torch.sigmoid(state_u + u) + n


_CELLS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda of_input, of_state, h: torch.tanh(of_state + of_input),
    "rnn_relu": lambda of_input, of_state, h: torch.relu(of_state + of_input),
}
