"""Packed sequences: packed in the forward, given to it, returned by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import dropfx
from dropfx.draws.runtime import shared
from dropfx.testing import assert_equivalent, record

UNITS = 64
OPTIONS = {"min_speedup": 0}


class Reader(nn.Module):
    """Dropout > pack > recurrent layers > pad > Dropout > Linear."""

    def __init__(self, kind: type[nn.RNNBase], bidirectional: bool, batch_first: bool, in_order: bool) -> None:
        super().__init__()
        self.before, self.after = nn.Dropout(0.5), nn.Dropout(0.5)
        self.layers = kind(UNITS, UNITS, 2, dropout=0.5, bidirectional=bidirectional, batch_first=batch_first)
        self.head = nn.Linear(UNITS * (1 + bidirectional), 32)
        self.batch_first, self.in_order = batch_first, in_order

    def forward(self, x: Tensor, lengths: Tensor, state: object = None) -> tuple[Tensor, object, Tensor]:
        packed = pack_padded_sequence(self.before(x), lengths, self.batch_first, self.in_order)
        hidden, state = self.layers(packed, state)
        padded, lengths = pad_packed_sequence(hidden, self.batch_first)
        return self.head(self.after(padded)), state, lengths


class Outer(nn.Module):
    def __init__(self, layers: nn.LSTM) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, sequence: PackedSequence) -> object:
        return self.layers(sequence)


def sequences(batch_first: bool, steps: int = 6, batch: int = 4) -> Tensor:
    return torch.randn((batch, steps, UNITS) if batch_first else (steps, batch, UNITS), dtype=torch.float64)


def packed(*lengths: int) -> PackedSequence:
    return pack_padded_sequence(torch.randn(max(lengths), len(lengths), UNITS), torch.tensor(lengths))


@pytest.mark.parametrize(
    ("kind", "bidirectional", "batch_first", "in_order"),
    [  # each pair of values of two of them meets
        (nn.LSTM, False, False, True),
        (nn.LSTM, True, True, False),
        (nn.GRU, False, True, False),
        (nn.GRU, True, False, True),
        (nn.RNN, False, True, True),
        (nn.RNN, True, False, False),
    ],
)
def test_exact_given_the_draw(kind: type[nn.RNNBase], bidirectional: bool, batch_first: bool, in_order: bool) -> None:
    model = Reader(kind, bidirectional, batch_first, in_order).double()
    x, lengths = sequences(batch_first), torch.tensor([6, 4, 4, 1] if in_order else [3, 6, 1, 4])
    report = dropfx.explain(model, x, lengths, options=OPTIONS)
    assert [(site.name, site.rewritten) for site in report.sites] == [
        ("before", False),  # packing ends the graph
        ("layers.dropout[0]", True),
        ("after", True),
    ]
    assert_equivalent(model, x, lengths, options=OPTIONS)
    state = torch.randn(2 * (1 + bidirectional), 4, UNITS, dtype=torch.float64)
    assert_equivalent(model, x, lengths, (state, state + 1) if kind is nn.LSTM else state, options=OPTIONS)


def test_other_lengths_are_not_traced_anew() -> None:
    model = dropfx.compile(Reader(nn.LSTM, False, False, True).double(), **OPTIONS)
    for steps, batch in ((6, 4), (5, 3)):  # what changes once is an input from then on
        model(sequences(False, steps, batch), torch.tensor([steps, 4, 4, 2][:batch]))
    before = shared.rewritten
    out, _, lengths = model(sequences(False, 8, 3), torch.tensor([8, 8, 3]))
    assert (shared.rewritten, out.shape, lengths.tolist()) == (before, (8, 3, 32), [8, 8, 3])


@pytest.mark.parametrize("wrapped", [False, True])
def test_packed_inputs_and_outputs(wrapped: bool) -> None:
    layers = nn.LSTM(UNITS, UNITS, 2, dropout=0.5)
    model = Outer(layers) if wrapped else layers
    assert_equivalent(model, packed(6, 4, 4, 1), options=OPTIONS)
    dropfx.compile(model, **OPTIONS)
    with record() as masks:
        out, _ = model(packed(6, 4, 4, 1))
    assert list(masks[0]) == ["layers.dropout[0]" if wrapped else "dropout[0]"]
    assert isinstance(out, PackedSequence)
    model(packed(7, 4, 2))
    before = shared.rewritten
    assert model(packed(8, 4, 4, 2, 2))[0].data.shape == (20, UNITS)
    assert shared.rewritten == before
