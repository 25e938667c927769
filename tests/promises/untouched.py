"""That a refused call leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tests.catalogue.case import mlp


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The model is afterwards what it was before."""
    attributes, kind = dict(model.__dict__), type(model)
    modules = [(type(module), module.training) for module in model.modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    assert type(model) is kind
    assert model.__dict__.keys() == attributes.keys()
    assert [(type(module), module.training) for module in model.modules()] == modules
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def example_mlp() -> nn.Module:
    return mlp(64, 96, 96, 8)
