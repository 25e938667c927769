"""`dropfx.testing` and `dropfx.disabled`: recording, the check for users' own models, training without dropout."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropfx
from dropfx.testing import assert_equivalent, record
from tests.catalogue import CASES
from tests.catalogue.case import mlp, pair
from tests.catalogue.test_equivalence import every
from tests.oracle import comparison, oracle

ALL = {"min_speedup": 0}
# models with tensors that are no leaves can't be copied
SKIPPED = ("before_", "after_", "hook_", "weight_norm_by_hook", "pruned")
ONE_OF_EACH = [name for name in CASES if not name.startswith(SKIPPED)]


@pytest.fixture
def model() -> nn.Module:
    return dropfx.compile(mlp(64, 96, 96, 8), **ALL)


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


# record


def test_one_dict_for_each_forward(model: nn.Module) -> None:
    with record() as masks:
        assert masks == []
        model(X)
        assert [set(entry) for entry in masks] == [{"2", "5"}]
        model(X)
    model(X)
    assert [set(entry) for entry in masks] == [{"2", "5"}] * 2


def test_multipliers_are_dense_and_fit_their_site(model: nn.Module) -> None:
    with record() as masks:
        model(X)
    for mask in masks[0].values():
        assert torch.broadcast_shapes(mask.shape, (4, 96)) == (4, 96)
        assert mask.is_floating_point()
        assert not mask.requires_grad
        assert set(mask.unique().tolist()) == {0.0, 2.0}


def test_order_is_that_of_the_forward() -> None:
    model = dropfx.compile(CASES["pre_norm_blocks"].make(), **ALL)
    with record() as masks:
        model(torch.randn(2, 5, 64))
    assert tuple(masks[0]) == CASES["pre_norm_blocks"].rewritten


def test_nothing_is_recorded_in_eval_or_for_plain_models(model: nn.Module) -> None:
    with record() as masks:
        model.eval()(X)
        mlp(64, 96, 8)(X)
    assert not any(masks)


def test_records_nest(model: nn.Module) -> None:
    with record() as outer:
        model(X)
        with record() as inner:
            model(X)
    assert (len(outer), len(inner)) == (2, 1)
    assert all(torch.equal(outer[1][name], inner[0][name]) for name in inner[0])


def test_models_record_separately(model: nn.Module) -> None:
    other = dropfx.compile(CASES["residual_add"].make(), **ALL)
    with record() as masks:
        model(X)
        other(X[:, None])
    assert [set(entry) for entry in masks] == [{"2", "5"}, {"drop"}]


def test_recording_ends_with_an_error(model: nn.Module) -> None:
    with pytest.raises(KeyError), record() as masks:
        raise KeyError
    model(X)
    assert masks == []


def test_recording_does_not_change_the_run(model: nn.Module) -> None:
    torch.manual_seed(0)
    want = model(X)
    torch.manual_seed(0)
    with record():
        assert torch.equal(model(X), want)


def test_recorded_masks_are_not_overwritten(model: nn.Module) -> None:
    with record() as masks:
        model(X)
        kept = {name: mask.clone() for name, mask in masks[0].items()}
        for _ in range(3):
            model(X).sum().backward()
    assert all(torch.equal(masks[0][name], mask) for name, mask in kept.items())


# assert_equivalent


@pytest.mark.filterwarnings("ignore:None of the inputs", "ignore:.*no dropout")
@pytest.mark.parametrize("name", every(ONE_OF_EACH, 12))
def test_catalogue_is_equivalent(name: str) -> None:
    case = CASES[name]
    args, kwargs = case.call(4, torch.float64)
    assert_equivalent(case.make(torch.float64), *args, options=ALL, kwargs=kwargs)


@pytest.mark.parametrize("name", ["mlp", "pre_norm_blocks", "embedding", "checkpoint"])
def test_slices_are_equivalent(name: str) -> None:
    case = CASES[name]
    args, kwargs = case.call(4)
    assert_equivalent(case.make(), *args, options={**ALL, "pattern": "slice"}, kwargs=kwargs)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_model_is_left_as_it_was(compiled: bool, training: bool) -> None:
    case = CASES["batch_norm_before"]
    model = case.make().train(training)
    if compiled:
        dropfx.compile(model, **ALL)
    args, _ = case.call(4)
    kind, state, generator = type(model), copy.deepcopy(model.state_dict()), (torch.get_rng_state(), random.getstate())
    assert_equivalent(model, *args, options=ALL)
    assert type(model) is kind
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator[0])
    assert random.getstate() == generator[1]


class WithDeadCode(nn.Module):
    """Reads a dropout by a Linear whose result nobody reads, before the one that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.unread, self.linear = nn.Dropout(0.5), nn.Linear(64, 32), nn.Linear(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 64] -> [batch, 96]"""
        dropped = self.drop(x)
        self.unread(dropped)
        return self.linear(dropped)


def test_what_nobody_reads_drops_no_tiles() -> None:
    assert_equivalent(WithDeadCode().double(), X.double(), options={"pattern": "tile", "min_speedup": 0})


class Lying(nn.Module):
    """Runs another computation every other time: no two runs of it agree."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(64, 96, 8)

    def forward(self, x: Tensor) -> Tensor:
        Lying.calls += 1
        return self.mlp(x) * float(Lying.calls)


def test_a_difference_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError, match=r"differ:\n(?s:.*)the same check in float64"):
        assert_equivalent(Lying(), X, options=ALL)
    with pytest.raises(AssertionError) as failed:
        assert_equivalent(Lying().double(), X.double(), options=ALL)
    assert "float64" not in str(failed.value)


def test_tolerances_can_be_given() -> None:
    model = mlp(64, 96, 96, 8)
    assert_equivalent(model, X, options=ALL, rtol=1e-3, atol=1e-3)
    with pytest.raises(AssertionError):
        assert_equivalent(Lying(), X, options=ALL, rtol=1e-3, atol=1e-3)
    assert_equivalent(Lying(), X, options=ALL, rtol=1e3, atol=1e3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"options": {"pattern": "no"}},
        {"options": {"patern": "slice"}},
        {"kwargs": {"unknown": 1}},
    ],
)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(dropfx.DropfxError):
        assert_equivalent(mlp(64, 96, 8), X, **arguments)
    with pytest.raises(dropfx.DropfxError):
        assert_equivalent("model", X)
    with pytest.raises(dropfx.DropfxError):
        assert_equivalent(mlp(64, 96, 8), torch.zeros(2, 63))


# disabled


def no_dropout(original: nn.Module, args: tuple[Any, ...]) -> oracle.Outcome:
    for module in original.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("p",):
            if name in module.__dict__:
                setattr(module, name, 0.0)
    return oracle.run(original, args)


@pytest.mark.parametrize(
    "name", ["mlp", "deep_chain", "attention", "pre_norm_blocks", "randn_like_inside", "checkpoint"]
)
def test_disabled_keeps_all_units(name: str) -> None:
    """Those left alone too; gradients included."""
    case = CASES[name]
    original, compiled = pair(case, torch.float64)
    args, _ = case.call(4, torch.float64)
    for _ in range(2):
        with dropfx.disabled():
            oracle.set_seed(0)
            got = oracle.run(compiled, args)
        if name != "randn_like_inside":
            comparison.compare(got, no_dropout(original, args), torch.float64)
        oracle.run(compiled, args)


def test_disabled_is_deterministic_and_ends(model: nn.Module) -> None:
    with dropfx.disabled():
        with dropfx.disabled():
            first = model(X)
        assert torch.equal(model(X), first)
    assert not torch.equal(model(X), model(X))
    with pytest.raises(KeyError), dropfx.disabled():
        raise KeyError
    assert not torch.equal(model(X), model(X))


def test_disabled_leaves_plain_models_alone() -> None:
    plain = mlp(64, 96, 8)
    with dropfx.disabled():
        assert not torch.equal(plain(X), plain(X))


def test_disabled_keeps_the_mode(model: nn.Module) -> None:
    with dropfx.disabled():
        model(X)
        assert all(module.training for module in model.modules())
    model.eval()
    want = model(X)
    with dropfx.disabled():
        assert torch.equal(model(X), want)
