"""The oracle by itself: it names sites, multiplies by the masks, and its comparison fails where it must."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.catalogue import CASES
from tests.catalogue.case import mlp
from tests.oracle import comparison, oracle


def half(width: int) -> Tensor:
    """Every other unit dropped, the others doubled."""
    return (torch.arange(width) % 2).double() * 2.0


class Names(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.drop, self.quiet = mlp(8, 8, 8), nn.Dropout(0.5), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.block(self.block(x)), 0.5)
        x = F.dropout(self.quiet(self.drop(self.drop(x))), 0.5, False)
        return F.dropout(x, 0.5, training=self.training)


def test_every_named_site_is_used() -> None:
    names = ["block.2", "block.2#2", ":dropout_1", "drop", "drop#2", ":dropout_3"]
    model = Names()
    with oracle.replaced_dropout(model, {name: half(8) for name in names}) as mode:
        model(torch.randn(2, 8))
    assert mode.used == set(names)


def test_names_start_anew_with_each_forward() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    for _ in range(2):
        with oracle.replaced_dropout(model, {"0": half(8)}):
            assert torch.equal(model(torch.ones(2, 8)), half(8).float().expand(2, 8))


def test_unrecorded_site_is_an_error() -> None:
    model = mlp(8, 8, 8, 8)
    with pytest.raises(oracle.UnrecordedSite, match="'5'"):
        oracle.oracle_run(model, {"2": half(8)}, (torch.randn(2, 8),))


def test_site_left_alone_draws_as_pytorch_does() -> None:
    model, x = mlp(8, 8, 8, 8), torch.randn(2, 8)
    outcome = oracle.oracle_run(model, {}, (x,), seed=3, left_alone=lambda name: True)
    oracle.set_seed(3)
    assert torch.equal(outcome.outputs[""], model(x))


def test_values_and_gradients_are_those_of_the_product() -> None:
    model, x = mlp(8, 8, 4).double(), torch.randn(2, 8, dtype=torch.float64)
    outcome = oracle.oracle_run(model, {"2": half(8)}, (x,))
    y = model[3](model[1](model[0](x)) * half(8))
    model.zero_grad()
    (y * oracle.cotangent(y, 0)).sum().backward()
    assert torch.equal(outcome.outputs[""], y.detach())
    assert all(torch.equal(outcome.grads[name], p.grad) for name, p in model.named_parameters())
    assert not outcome.grads["3.weight"][:, ::2].any()


def test_inplace_site_writes_its_input() -> None:
    model, x = nn.Dropout(0.5, inplace=True), torch.ones(2, 8)
    with oracle.replaced_dropout(model, {"": half(8)}):
        assert model(x) is x
    assert torch.equal(x[0], half(8).float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_run_plainly(reentrant: bool) -> None:
    case = CASES["checkpoint_reentrant" if reentrant else "checkpoint"]
    args, _ = case.call(3)
    outcome = oracle.oracle_run(case.make(), {"mlp.2": half(96)}, args)
    assert not outcome.grads["mlp.3.weight"][:, ::2].any()
    assert outcome.grads["mlp.3.weight"][:, 1::2].any()


@pytest.fixture
def outcome() -> oracle.Outcome:
    case = CASES["batch_norm_aside"]
    args, _ = case.call(4)
    return oracle.oracle_run(case.make(), {"drop": half(96)}, args)


def changed(outcome: oracle.Outcome, field: str, path: str, value: object) -> oracle.Outcome:
    return dataclasses.replace(outcome, **{field: {**getattr(outcome, field), path: value}})


def test_equal_outcomes_pass(outcome: oracle.Outcome) -> None:
    comparison.compare(outcome, dataclasses.replace(outcome), torch.float64)


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("outputs", "[0]"),
        ("inputs", "[0][0]"),
        ("input_grads", "[0][0]"),
        ("grads", "lin1.bias"),
        ("buffers", "norm.running_var"),
        ("parameters", "lin2.weight"),
    ],
)
def test_any_difference_fails(outcome: oracle.Outcome, field: str, path: str) -> None:
    value = getattr(outcome, field)[path]
    with pytest.raises(AssertionError, match=field):
        comparison.compare(changed(outcome, field, path, 1.001 * value), outcome, torch.float32)
    with pytest.raises(AssertionError, match=field):
        comparison.compare(changed(outcome, field, path, value.double()), outcome, torch.float32)
    with pytest.raises(AssertionError, match=field):
        comparison.compare(changed(outcome, field, path, None), outcome, torch.float32)


def test_not_finite_fails(outcome: oracle.Outcome) -> None:
    value = outcome.grads["lin2.weight"] * float("nan")
    with pytest.raises(AssertionError, match="finite"):
        comparison.compare(changed(outcome, "grads", "lin2.weight", value), outcome, torch.bfloat16)


def test_dropped_places_must_be_exactly_zero(outcome: oracle.Outcome) -> None:
    value = outcome.grads["lin2.weight"].clone()
    value[0, 0] = 1e-30
    with pytest.raises(AssertionError, match="exactly zero"):
        comparison.compare(changed(outcome, "grads", "lin2.weight", value), outcome, torch.bfloat16)


def test_flatten_tells_containers_apart() -> None:
    assert oracle.flatten((1, [2])) != oracle.flatten([1, [2]])
    assert oracle.flatten({"a": 1}) != oracle.flatten({"b": 1})


def test_fresh_keeps_identity() -> None:
    x = torch.ones(2)
    (a, b), same = oracle.fresh(((x, x), x), True)
    assert a is b is same
    assert a is not x
    assert a.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_catalogue_runs_as_written(name: str) -> None:
    case = CASES[name]
    args, kwargs = case.call(4)
    oracle.set_seed(0)
    oracle.run(case.make(), args, kwargs, input_grad=case.input_grad)
