"""Promise 6: restore, compiling twice, compiling a part, two models of one class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dropfx
from tests.catalogue import CASES
from tests.catalogue.case import check_step, recording
from tests.catalogue.hooks import Nested
from tests.catalogue.nets import Net, example, nets, recorded_sites


@pytest.mark.parametrize("traced", [False, True])
def test_restore_undoes_compile(traced: bool) -> None:
    original, model = Net(), Net()
    model.load_state_dict(original.state_dict())
    attributes = set(model.__dict__)
    dropfx.compile(model, min_speedup=0)
    if traced:
        model(torch.randn(2, 64))
    restored = dropfx.restore(model)
    assert restored is None or restored is model
    assert type(model) is Net
    assert set(model.__dict__) == attributes
    x = torch.randn(4, 64)
    torch.manual_seed(0)
    want = original(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), want)


def test_restore_reaches_parts_compiled_on_their_own() -> None:
    """A model that can't be traced whole is compiled child by child; nothing of that stays."""
    model = CASES["randn_inside"].make()
    dropfx.compile(model, min_speedup=0)
    model(torch.randn(2, 64))
    dropfx.restore(model)
    assert recorded_sites(model, torch.randn(2, 64)) == set()
    assert [type(module) for module in model.mlp] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert type(model.mlp) is nn.Sequential


def test_compile_after_restore() -> None:
    original, compiled = nets()
    dropfx.restore(compiled)
    dropfx.compile(compiled, min_speedup=0, pattern="slice")
    assert set(check_step(original, compiled, (example(),), dtype=torch.float64)) == {"drop"}


def test_compiling_twice_replaces_the_options() -> None:
    _, compiled = nets()
    compiled(example())
    kind = type(compiled)
    assert dropfx.compile(compiled, pattern=dropfx.patterns.Block(48), min_speedup=0) is compiled
    assert type(compiled).__mro__[1:] == kind.__mro__[1:]
    with recording() as masks:
        compiled(example())
    assert (masks["drop"].flatten()[:48] == 0).all() != (masks["drop"].flatten()[48:] == 0).all()
    dropfx.compile(compiled, min_speedup=1e9)
    assert recorded_sites(compiled) == set()
    dropfx.restore(compiled)
    assert type(compiled) is Net


def test_part_of_a_model() -> None:
    """Names are those of the compiled part; the rest runs as written."""
    original, whole = Nested().double(), Nested().double()
    whole.load_state_dict(original.state_dict())
    dropfx.compile(whole.body, min_speedup=0)
    assert type(whole) is Nested
    assert recorded_sites(whole) == {"2"}


def test_part_and_then_the_whole() -> None:
    original, whole = Nested().double(), Nested().double()
    whole.load_state_dict(original.state_dict())
    dropfx.compile(whole.body, min_speedup=0)
    whole(example())
    dropfx.compile(whole, min_speedup=0)
    whole(example())
    for _ in range(2):
        assert {"drop", "head.2"} <= recorded_sites(whole)
    dropfx.restore(whole)
    dropfx.restore(whole.body)
    assert recorded_sites(whole) == set()
    assert type(whole.body) is nn.Sequential


def test_two_models_of_one_class() -> None:
    first, second = dropfx.compile(Net(), min_speedup=0), dropfx.compile(Net(32), pattern="slice", min_speedup=0)
    plain = Net()
    x = torch.randn(2, 64)
    assert recorded_sites(first, x) == recorded_sites(second, x) == {"drop"}
    assert recorded_sites(plain, x) == set()
    assert type(plain) is Net
