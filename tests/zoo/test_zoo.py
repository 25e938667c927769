"""Other people's models through both front ends: promises 1, 2 and 6 of docs/design.md, and what are rewritten."""

from __future__ import annotations

import copy
import fnmatch
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

import dropfx
from dropfx.bench.models import define_operators
from tests.catalogue.case import compiled_run, sgd_step
from tests.oracle import comparison, oracle
from tests.zoo.catalogue import ZOO, Built, Entry

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]  # of their packages

OPTIONS: list[dict[str, Any]] = [{}, {"pattern": "slice"}, {"pattern": "row"}, {"groups": 2}]
INNERS = ("eager", "aot_eager")


@pytest.fixture(params=ZOO)
def entry(request: pytest.FixtureRequest) -> Entry:
    define_operators()
    found = ZOO[request.param]
    pytest.importorskip(found.package)
    torch._dynamo.reset()
    return found


def built(entry: Entry) -> Built:
    """In float64, in which rounding moves no unit over the kink of a ReLU."""
    return entry.make(torch.float64)


def torch_compiled(model: nn.Module, inner: str, **options: Any) -> Any:
    given = {"min_speedup": 0, "inner": inner, **options}
    return torch.compile(copy.deepcopy(model), backend="dropfx", options=given)


def rewritten(entry: Entry, **options: Any) -> set[str]:
    model, args, kwargs = built(entry)
    report = dropfx.explain(model, *args, options={"min_speedup": 0, **options}, kwargs=kwargs)
    return {site.name for site in report.sites if site.rewritten}


def check(original: nn.Module, compiled: nn.Module, args: Any, kwargs: Any, seed: int) -> set[str]:
    """Promise 2 for one training step; names of the sites that were drawn."""
    actual, masks = compiled_run(compiled, args, kwargs, seed=seed)
    for field in ("grads", "parameters", "buffers"):
        named = getattr(actual, field).items()
        setattr(actual, field, {path.removeprefix("_orig_mod."): value for path, value in named})
    alone = lambda name: name not in masks  # noqa: E731
    expected = oracle.oracle_run(original, masks, args, kwargs, seed=seed, left_alone=alone)
    comparison.compare(actual, expected, torch.float64)
    return set(masks)


def test_sites(entry: Entry) -> None:
    """Every dropout is rewritten but those of which the catalogue says why not."""
    model, args, kwargs = built(entry)
    report = dropfx.explain(model, *args, options={"min_speedup": 0}, kwargs=kwargs)
    assert report.sites
    for site in report.sites:
        words = [word for names, word in entry.left.items() if fnmatch.fnmatchcase(site.name, names)]
        assert site.rewritten == (not words), f"{site.name}: {site.reason}"
        assert all(word in site.reason for word in words), f"{site.name}: {site.reason}"
    unused = [n for n in entry.left if not fnmatch.filter([site.name for site in report.sites], n)]
    assert not unused


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compile(entry: Entry, options: dict[str, Any]) -> None:
    model, args, kwargs = built(entry)
    compiled = dropfx.compile(copy.deepcopy(model), min_speedup=0, **options)
    for step in range(2):
        assert check(model, compiled, args, kwargs, step) == rewritten(entry, **options)
        sgd_step(compiled, model)


@pytest.mark.parametrize("inner", INNERS)
def test_torch_compile(entry: Entry, inner: str) -> None:
    model, args, kwargs = built(entry)
    compiled = torch_compiled(model, inner)
    for step in range(2):
        assert check(model, compiled, args, kwargs, step) == rewritten(entry) - entry.breaks
        sgd_step(compiled, model)


def test_assert_equivalent(entry: Entry) -> None:
    model, args, kwargs = built(entry)
    dropfx.testing.assert_equivalent(model, *args, options={"min_speedup": 0}, kwargs=kwargs)


def assert_same(actual: nn.Module, expected: nn.Module, args: Any, kwargs: Any) -> None:
    """Bit for bit, forward and backward."""
    for model in (actual, expected):
        model.eval()
    outcomes = [oracle.run(model, args, kwargs) for model in (actual, expected)]
    for field in ("outputs", "grads", "buffers"):
        ours, theirs = (
            {path.removeprefix("_orig_mod."): value for path, value in getattr(outcome, field).items()}
            for outcome in outcomes
        )
        assert not list(comparison.differences(ours, theirs, 0.0)), field


def test_eval_and_state_dict(entry: Entry) -> None:
    """After a training step the weights move to a model that was never compiled, and back."""
    model, args, kwargs = built(entry)
    compiled = dropfx.compile(copy.deepcopy(model), min_speedup=0)
    assert_same(compiled, model, args, kwargs)
    oracle.run(compiled.train(), args, kwargs)
    with torch.no_grad():
        for parameter in compiled.parameters():
            parameter.sub_(0.01 if parameter.grad is None else 0.01 * parameter.grad)
    state = copy.deepcopy(compiled.state_dict())
    assert list(state) == list(model.state_dict())
    model.load_state_dict(state)
    assert_same(compiled, model, args, kwargs)
    again = dropfx.compile(built(entry)[0], min_speedup=0)
    again.load_state_dict(model.state_dict())
    assert_same(again, model, args, kwargs)
    assert_same(dropfx.restore(compiled), model, args, kwargs)


@pytest.mark.parametrize("inner", INNERS)
def test_eval_under_torch_compile(entry: Entry, inner: str) -> None:
    model, args, kwargs = built(entry)
    compiled = torch_compiled(model, inner)
    torch.manual_seed(0)
    compiled(*args, **kwargs)
    model.load_state_dict(compiled._orig_mod.state_dict())
    torch._dynamo.reset()
    assert_same(compiled, torch.compile(model, backend=inner), args, kwargs)
