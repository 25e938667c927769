"""groups="time": a draw a step of recurrent networks, the same for the whole batch, whichever axis the steps lie on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dropfx
from dropfx.draws.runtime import shared
from dropfx.errors import InvalidOption
from dropfx.testing import assert_equivalent, record

UNITS = 64
LAYERS = [nn.LSTM, nn.GRU, nn.RNN]


class Tagger(nn.Module):
    """Embedding > Dropout > recurrent layers with dropout between > Dropout > Linear."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool, bidirectional: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, UNITS)
        self.before, self.after = nn.Dropout(0.5), nn.Dropout(0.5)
        self.layers = kind(UNITS, UNITS, 2, dropout=0.5, batch_first=batch_first, bidirectional=bidirectional)
        self.head = nn.Linear(UNITS * (1 + bidirectional), 40)

    def forward(self, words: Tensor) -> tuple[Tensor, object]:
        hidden, state = self.layers(self.before(self.embedding(words)))
        return self.head(self.after(hidden)), state


def words(steps: int, batch: int, batch_first: bool) -> Tensor:
    return torch.randint(50, (batch, steps) if batch_first else (steps, batch))


@pytest.mark.parametrize(
    ("kind", "batch_first", "bidirectional", "pattern"),
    [  # each pair of values of two of them meets
        (nn.LSTM, False, False, "block"),
        (nn.LSTM, True, True, "slice"),
        (nn.LSTM, True, False, "row"),
        (nn.GRU, True, True, "block"),
        (nn.GRU, False, False, "slice"),
        (nn.GRU, False, True, "row"),
        (nn.RNN, True, False, "block"),
        (nn.RNN, False, True, "slice"),
        (nn.RNN, True, False, "row"),
    ],
)
def test_exact_given_the_draw(kind: type[nn.RNNBase], batch_first: bool, bidirectional: bool, pattern: str) -> None:
    model = Tagger(kind, batch_first, bidirectional).double()
    options = {"groups": "time", "min_speedup": 0, "pattern": pattern}
    report = dropfx.explain(model, words(6, 3, batch_first), options=options)
    assert [site.rewritten for site in report.sites] == [True] * 3
    assert_equivalent(model, words(6, 3, batch_first), options=options)


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_draw_a_step(batch_first: bool) -> None:
    """Masks broadcast over the batch; steps differ; over the steps each unit is kept equally often, to one."""
    model = dropfx.compile(Tagger(nn.LSTM, batch_first), groups="time", min_speedup=0)
    with record() as masks:
        model(words(7, 3, batch_first))
    for name, mask in masks[0].items():
        assert mask.shape == ((1, 7, UNITS) if batch_first else (7, 1, UNITS)), name
        by_step = mask.reshape(7, UNITS)
        assert not torch.equal(by_step[0], by_step[1])
        kept = (by_step != 0).sum(0)
        assert set(kept.tolist()) <= {3, 4}
        assert (by_step != 0).sum(1).tolist() == [UNITS // 2] * 7


def test_each_length_is_traced_once() -> None:
    model = dropfx.compile(Tagger(nn.LSTM, False), groups="time", min_speedup=0)
    for steps in (5, 3):
        model(words(steps, 2, False))
    before = shared.rewritten
    for steps in (5, 3, 5):
        with record() as masks:
            model(words(steps, 2, False))
        assert masks[0]["before"].shape[0] == steps
    assert shared.rewritten == before


def test_without_steps_one_draw_a_call() -> None:
    """A network without recurrent layers has no time axis, and a matrix no steps."""
    model = dropfx.compile(
        nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 8)), groups="time", min_speedup=0
    )
    with record() as masks:
        model(torch.randn(4, 3, 64))
    assert masks[0]["1"].shape == (64,)


def test_several_readers_of_a_turned_site() -> None:
    """A batch-first site that a Linear, a sum and the recurrence read."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(UNITS, UNITS), nn.Linear(UNITS, 8)
            self.drop, self.layers = nn.Dropout(0.5), nn.GRU(UNITS, UNITS, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dropped = self.drop(self.first(x))
            return self.second(dropped), dropped + x, self.layers(dropped)[0]

    assert_equivalent(
        Shared().double(), torch.randn(3, 5, UNITS).double(), options={"groups": "time", "min_speedup": 0}
    )


@pytest.mark.parametrize("batch_first", [False, True])
def test_under_torch_compile(batch_first: bool) -> None:
    model = Tagger(nn.LSTM, batch_first).double()
    options = {"groups": "time", "min_speedup": 0, "inner": "aot_eager"}
    compiled = torch.compile(copy.deepcopy(model), backend="dropfx", options=options)
    eager = dropfx.compile(copy.deepcopy(model), groups="time", min_speedup=0)
    for steps, batch in ((5, 2), (5, 3), (4, 3)):
        given = words(steps, batch, batch_first)
        outcomes = []
        for one in (compiled, eager):
            torch.manual_seed(steps)
            with record() as masks:
                out = one(given)[0]
            out.sum().backward()
            outcomes.append((out, masks[0]))
        (ours, drawn), (theirs, expected) = outcomes
        torch.testing.assert_close(ours, theirs)
        assert drawn.keys() == expected.keys()
        assert all(torch.equal(drawn[name], expected[name]) for name in drawn)


@pytest.mark.parametrize("groups", ["times", 0, 1.5, None])
def test_other_words_are_refused(groups: object) -> None:
    with pytest.raises(InvalidOption, match=r"groups: got .*integers >= 1 .* and 'time'"):
        dropfx.compile(Tagger(nn.LSTM, False), groups=groups)  # type: ignore[arg-type]
