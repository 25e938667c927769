"""Dropouts that run as written draw what PyTorch draws under the same seed, in whatever layout their neighbours are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropfx
from tests.catalogue.case import check_step
from tests.promises.both_ways import check_both_ways, compiled_both_ways

UNITS = 64


class Sequences(nn.Module):
    """A batch-first recurrent network, whose sites are turned so that steps lead; some have too few units."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.few = nn.Embedding(50, UNITS), nn.Embedding(50, 3)
        self.layers, self.narrow = nn.GRU(UNITS, UNITS, batch_first=True), nn.Linear(UNITS, 3)
        self.d, self.e, self.body = nn.Dropout(0.5), nn.Dropout(0.5), body

    def forward(self, words: Tensor) -> Tensor:
        return self.body(self, words)


TURNED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "behind_a_linear": lambda m, w: m.layers(m.d(m.words(w)))[0].sum() + m.e(m.narrow(m.d(m.words(w)))),
    "behind_the_layers": lambda m, w: m.e(m.narrow(m.layers(m.d(m.words(w)))[0])),
    "of_an_embedding": lambda m, w: m.layers(m.d(m.words(w)))[0].sum() + m.e(m.few(w)),
    "functional": lambda m, w: F.dropout(m.narrow(m.d(m.layers(m.d(m.words(w)))[0])).relu(), 0.5, m.training),
    "turned_by_the_model": lambda m, w: m.e(m.narrow(m.layers(m.d(m.words(w)))[0]).transpose(0, 1)),
}


@pytest.mark.parametrize("groups", ["time", 1, 2])
@pytest.mark.parametrize("name", TURNED)
def test_turned_neighbours(name: str, groups: Any) -> None:
    torch.manual_seed(0)
    model = Sequences(TURNED[name]).double()
    words = torch.randint(50, (4, 6))
    for compiled in compiled_both_ways(model, groups=groups):
        for seed in (1, 2):
            masks = check_step(
                model, compiled, (words,), dtype=torch.float64, seed=seed, left_alone=("e", ":dropout_1")
            )
            assert "d" in masks
            assert not masks.keys() & {"e", ":dropout_1"}


def few(m: Any, h: Tensor) -> Tensor:
    """A dropout of so few units that it runs as written."""
    return m.e(h[..., :3])


PERMUTED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "put_behind_a_transpose": lambda m, x: few(m, m.d(m.a(x)).transpose(0, 1).relu()),
    "put_behind_permutations": lambda m, x: few(m, m.d(m.a(x)).permute(1, 0, 2).tanh().permute(1, 0, 2)),
    "stack": lambda m, x: few(m, torch.stack(m.d(m.a(x)).unbind(1), -2)),
    "rand_like": lambda m, x: m.d(m.a(x)).transpose(0, 1).relu().mul(torch.rand_like(m.a(x).transpose(0, 1))),
    "units_first": lambda m, x: few(m, m.c(m.d(m.a(x))).transpose(0, 2).transpose(0, 2)),
}


@pytest.mark.parametrize("name", PERMUTED)
def test_neighbours_that_are_compact(name: str) -> None:
    check_both_ways(PERMUTED[name], rewritten={"d"}, left=("e",))


def test_only_where_something_is_rewritten() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5), nn.Linear(3, 8))
    compiled, x = dropfx.compile(copy.deepcopy(model)), torch.randn(4, 8)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), expected)
