"""Recurrent networks in loops of their own: nn.LSTMCell, nn.GRUCell, nn.RNNCell that read dropped values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.catalogue.case import case, vectors

STEPS = 3
CELLS: dict[str, Callable[[], nn.RNNCellBase]] = {
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


class OneMask(nn.Module):
    """Masks by hand, each of all steps, on the inputs, the state and the outputs of a cell: Gal's variational LSTM."""

    def __init__(self, form: str, places: str, cell: nn.Module, p: float = 0.25) -> None:
        super().__init__()
        self.form, self.places, self.cell, self.p = form, places, cell, p
        self.out = nn.Linear(96, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, c = x.new_zeros(x.size(0), 96), x.new_zeros(x.size(0), 96)
        on_input, on_state, on_output = (self.mask(x, width, place) for place, width in PLACES.items())
        rows = []
        for t in range(x.size(1)):
            h, c = self.step(dropped(x[:, t], on_input), dropped(h, on_state), c)
            rows.append(dropped(h, on_output))
        return self.out(torch.stack(rows, 1)), h

    def mask(self, x: Tensor, width: int, place: str) -> Tensor | None:
        if not self.training or self.p == 0 or place not in self.places:
            return None
        keep = 1 - self.p
        if self.form == "bernoulli":
            return torch.bernoulli(torch.full((x.size(0), width), keep, dtype=x.dtype)) / keep
        if self.form == "dropout":
            return F.dropout(torch.ones(x.size(0), width, dtype=x.dtype), self.p, self.training)
        return x.new_empty(x.size(0), width).bernoulli_(keep).div_(keep)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.cell, (nn.GRUCell, nn.RNNCell)):
            return self.cell(x, h), c
        return self.cell(x, (h, c))


PLACES = {"input": 64, "state": 96, "output": 96}


def dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


class OwnCell(nn.Module):
    """An LSTM cell of two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(64, 4 * 96), nn.Linear(96, 4 * 96)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, g, o = (self.of_input(x) + self.of_state(h)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


ONE_MASK: dict[str, tuple[str, str, Callable[[], nn.Module]]] = {
    "lstm": ("bernoulli", "state", CELLS["lstm_cell"]),
    "lstm_by_dropout": ("dropout", "state", CELLS["lstm_cell"]),
    "lstm_in_place": ("in place", "state", CELLS["lstm_cell_without_bias"]),
    "gru": ("bernoulli", "state", CELLS["gru_cell"]),
    "rnn": ("in place", "state", CELLS["rnn_cell"]),
    "own_cell": ("bernoulli", "state", OwnCell),
    "own_cell_by_dropout": ("dropout", "input state output", OwnCell),
    "input": ("in place", "input", CELLS["lstm_cell"]),
    "output": ("bernoulli", "output", CELLS["gru_cell"]),
    "everywhere": ("bernoulli", "input state output", CELLS["lstm_cell"]),
}
"""One mask of all steps: how it is made, what it drops, the cell."""
for _name, (_form, _places, _cell) in ONE_MASK.items():
    _kind = "dropout" if _form == "dropout" else "bernoulli"
    case(
        f"one_mask_{_name}",
        vectors(64, STEPS),
        rewritten=tuple(f":{_kind}_{number + 1}" for number in range(len(_places.split()))),
    )(lambda form=_form, places=_places, cell=_cell: OneMask(form, places, cell()))
case("one_mask_off", vectors(64, STEPS))(lambda: OneMask("bernoulli", "state", nn.LSTMCell(64, 96), p=0.0))


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
