"""Promise 5: parameters and modules are those that the model has at the call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dropfx
from tests.catalogue import CASES
from tests.catalogue.case import pair, recording
from tests.promises.switching import check, dropped_share, example

PATTERNS = ("block", "slice")


@pytest.fixture(params=PATTERNS)
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """The original and the compiled MLP with the sites "2" and "5", traced once."""
    models = pair(CASES["mlp"], torch.float64, pattern=request.param)
    check(models)
    return models


def test_frozen_and_thawed(models: tuple[nn.Module, nn.Module]) -> None:
    for frozen in (True, False, True):
        for model in models:
            model[3].weight.requires_grad_(not frozen)
            model[0].bias.requires_grad_(frozen)
        check(models)


def test_parameter_replaced(models: tuple[nn.Module, nn.Module]) -> None:
    weight = torch.randn(96, 128, dtype=torch.float64)
    for model in models:
        model[3].weight = nn.Parameter(weight.clone())
        model[0].bias.data = torch.ones(128, dtype=torch.float64)
    check(models)


def test_bias_removed(models: tuple[nn.Module, nn.Module]) -> None:
    for model in models:
        model[3].bias = None
    check(models)


def test_layer_replaced(models: tuple[nn.Module, nn.Module]) -> None:
    layer = nn.Linear(128, 96, dtype=torch.float64)
    for model in models:
        model[3] = nn.Linear(128, 96, dtype=torch.float64)
        model[3].load_state_dict(layer.state_dict())
    check(models)


def test_activation_replaced(models: tuple[nn.Module, nn.Module]) -> None:
    for model in models:
        model[1] = nn.Sigmoid()
    check(models)


def test_dropout_replaced_by_identity(models: tuple[nn.Module, nn.Module]) -> None:
    for model in models:
        model[2] = nn.Identity()
    assert set(check(models)) == {"5"}


def test_dropout_replaced_by_dropout(models: tuple[nn.Module, nn.Module]) -> None:
    for model in models:
        model[2] = nn.Dropout(0.75)
    assert dropped_share(check(models)["2"]) == 0.75


def test_widths_changed(models: tuple[nn.Module, nn.Module]) -> None:
    first, second = nn.Linear(64, 192, dtype=torch.float64), nn.Linear(192, 96, dtype=torch.float64)
    for model in models:
        model[0], model[3] = nn.Linear(64, 192, dtype=torch.float64), nn.Linear(192, 96, dtype=torch.float64)
        model[0].load_state_dict(first.state_dict())
        model[3].load_state_dict(second.state_dict())
    assert check(models)["2"].numel() == 192


def test_layer_appended(models: tuple[nn.Module, nn.Module]) -> None:
    for model in models:
        model.append(nn.Tanh())
    check(models)


def test_disabled_takes_effect_at_once(models: tuple[nn.Module, nn.Module]) -> None:
    with dropfx.disabled(), recording() as masks:
        models[1](example())
    assert all((mask == 1).all() for mask in masks.values())
    assert set(check(models)) == {"2", "5"}
