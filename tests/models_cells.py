"""Recurrent networks in loops of their own: nn.LSTMCell, nn.GRUCell, nn.RNNCell that read dropped values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.case import case, vectors

STEPS = 3
CELLS = {
    "lstm_cell": lambda: nn.LSTMCell(64, 96),
    "lstm_cell_without_bias": lambda: nn.LSTMCell(64, 96, bias=False),
    "gru_cell": lambda: nn.GRUCell(64, 96),
    "gru_cell_without_bias": lambda: nn.GRUCell(64, 96, bias=False),
    "rnn_cell": lambda: nn.RNNCell(64, 96),
    "rnn_cell_relu": lambda: nn.RNNCell(64, 96, nonlinearity="relu"),
}


class Loop(nn.Module):
    """Dropout on the inputs of each step, and on the hidden state that it reads."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.on_input, self.on_state = cell, nn.Dropout(0.5), nn.Dropout(0.25)
        self.out = nn.Linear(96, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        state: Any = None
        rows = []
        for t in range(STEPS):
            state = self.cell(self.on_input(x[:, t]), self.dropped(state))
            rows.append(state[0] if isinstance(state, tuple) else state)
        return self.out(torch.stack(rows, 1)), state

    def dropped(self, state: Any) -> Any:
        if isinstance(state, tuple):
            return self.on_state(state[0]), state[1]
        return None if state is None else self.on_state(state)


_SITES = ("on_input", "on_input#2", "on_input#3", "on_state", "on_state#2")
for _name, _cell in CELLS.items():
    case(_name, vectors(64, STEPS), rewritten=_SITES)(lambda cell=_cell: Loop(cell()))


@case("cell_once_for_all_steps", vectors(64, STEPS), rewritten=("drop",))
class OnceForAllSteps(nn.Module):
    """One dropout before the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.drop, self.cell = nn.Linear(64, 64), nn.Dropout(0.5), nn.GRUCell(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), 96)
        for step in self.drop(F.relu(self.lin(x))).unbind(1):
            h = self.cell(step, h)
        return h


@case("cell_without_batch", lambda batch, draw: (draw(64),), rewritten=("drop",))
class WithoutBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.drop, self.cell = nn.Linear(64, 64), nn.Dropout(0.5), nn.LSTMCell(64, 96)

    def forward(self, x: Tensor) -> Any:
        return self.cell(self.drop(self.lin(x)))


@case("cell_read_by_nothing_dropped", vectors(64), rewritten=("drop",))
class Behind(nn.Module):
    """The cell itself reads nothing dropped: it stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.drop, self.lin = nn.GRUCell(64, 96), nn.Dropout(0.5), nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.drop(self.cell(x)))
