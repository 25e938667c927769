"""Whatever model it is, a change of something that its forward reads is heard, as plain PyTorch hears it.

The changes come one after another, each followed by a step, so that later ones meet what earlier ones left.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from tests.catalogue import CASES
from tests.catalogue.case import Case, check_step, pair

DTYPE = torch.float64


def places(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[tuple[nn.Module, str]]:
    """(parent, name) of each submodule of a kind, but of those whose weights are made by others."""
    found = [(parent, name) for parent in model.modules() for name, child in parent.named_children()]
    fitting = [(parent, name) for parent, name in found if isinstance(getattr(parent, name), kind)]
    own = [(parent, name) for parent, name in fitting if not is_parametrized(getattr(parent, name))]
    return [(p, name) for p, name in own if kind is not nn.Linear or "weight" in getattr(p, name)._parameters]


def of_kind(model: nn.Module, kind: Any) -> list[Any]:
    return [getattr(parent, name) for parent, name in places(model, kind)]


def written_by_users(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Plain attributes of the modules whose classes are not PyTorch's."""
    for module in model.modules():
        if not type(module).__module__.startswith("torch."):
            for name, value in vars(module).items():
                if not name.startswith("_") and name != "training":
                    yield module, name, value


# -- the changes: each returns whether there was something to change ---------------------------------------------------


def number(model: nn.Module) -> bool:
    found = [(m, name, value) for m, name, value in written_by_users(model) if type(value) is float]
    for module, name, value in found:
        setattr(module, name, value / 2)
    return bool(found)


def flag(model: nn.Module) -> bool:
    found = [(m, name, value) for m, name, value in written_by_users(model) if type(value) is bool]
    for module, name, value in found[:1]:
        setattr(module, name, not value)
    return bool(found)


def rate(model: nn.Module) -> bool:
    found = of_kind(model, nn.modules.dropout._DropoutNd)
    for dropout in found:
        dropout.p = 0.3
    return bool(found)


def dropout_replaced(model: nn.Module) -> bool:
    found = places(model, nn.Dropout)
    for parent, name in found[:1]:
        setattr(parent, name, nn.Dropout(0.25))
    return bool(found)


def layer_replaced(model: nn.Module) -> bool:
    found = places(model, nn.Linear)
    for parent, name in found[:1]:
        old = getattr(parent, name)
        made = nn.Linear(old.in_features, old.out_features, old.bias is not None).to(old.weight)
        with torch.no_grad():
            made.weight.copy_(old.weight.flip(0) / 2)
            if old.bias is not None:
                made.bias.copy_(old.bias)
        setattr(parent, name, made)
    return bool(found)


def parameter_replaced(model: nn.Module) -> bool:
    found = of_kind(model, nn.Linear)
    for linear in found[:1]:
        linear.weight = nn.Parameter(linear.weight.detach() * 2)
    return bool(found)


def weight_written(model: nn.Module) -> bool:
    found = of_kind(model, nn.Linear)
    for linear in found:
        linear.weight.data.mul_(0.5)
    return bool(found)


def bias_removed(model: nn.Module) -> bool:
    found = [linear for linear in of_kind(model, nn.Linear) if linear.bias is not None]
    for linear in found[-1:]:
        linear.bias = None
    return bool(found)


def frozen(model: nn.Module) -> bool:
    found = list(model.parameters())
    for parameter in found[:1]:
        parameter.requires_grad_(False)
    return bool(found)


def hook(model: nn.Module) -> bool:
    found = of_kind(model, nn.Linear)
    for linear in found[-1:]:
        linear.register_forward_hook(lambda module, args, out: out * 2)
    return bool(found)


def hook_before(model: nn.Module) -> bool:
    found = of_kind(model, nn.Linear)
    for linear in found[-1:]:
        linear.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    return bool(found)


def method_of_an_instance(model: nn.Module) -> bool:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)

    found = of_kind(model, nn.Linear)
    for linear in found[:1]:
        linear.forward = types.MethodType(forward, linear)
    return bool(found)


def class_of_a_part(model: nn.Module) -> bool:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    found = [linear for linear in of_kind(model, nn.Linear) if type(linear) is nn.Linear]
    for linear in found[-1:]:
        linear.__class__ = Doubled
    return bool(found)


def buffer(model: nn.Module) -> bool:
    found = [(m, name, b) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    floating = [(module, name, value) for module, name, value in found if value.is_floating_point()]
    for module, name, value in floating[:1]:
        setattr(module, name, value / 2)
    return bool(floating)


def identity(model: nn.Module) -> bool:
    found = [dropout for dropout in of_kind(model, nn.Dropout) if type(dropout) is nn.Dropout]
    for dropout in found[1:2]:
        dropout.p = 0.0
    return len(found) > 1


def switched_off(model: nn.Module) -> bool:
    found = of_kind(model, nn.modules.dropout._DropoutNd)
    for dropout in found[-1:]:
        dropout.eval()
    return bool(found)


CHANGES: tuple[Callable[[nn.Module], bool], ...] = (
    rate,
    weight_written,
    hook,
    number,
    parameter_replaced,
    buffer,
    frozen,
    dropout_replaced,
    hook_before,
    layer_replaced,
    bias_removed,
    method_of_an_instance,
    class_of_a_part,
    identity,
    flag,
    switched_off,
)


class Whatever:
    """Sites that may run as written: all, for a change may be why."""

    def __contains__(self, name: str) -> bool:
        return True


def raises(case: Case, changes: list[Callable[[nn.Module], bool]]) -> type[Exception] | None:
    """What plain PyTorch raises once the model was changed."""
    model = case.make(DTYPE)
    for change in changes:
        change(model)
    args, kwargs = case.call(case.batches[0], DTYPE)
    try:
        model(*args, **kwargs)
    except Exception as error:
        return type(error)
    return None


@pytest.mark.filterwarnings("ignore:.*no dropout")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (place % 40 > 0)) for place, name in enumerate(CASES)]
)
def test_changes_are_heard(name: str) -> None:
    case = CASES[name]
    original, compiled = pair(case, DTYPE)
    made: list[Callable[[nn.Module], bool]] = []
    rewritten = []

    def step(number: int) -> None:
        args, kwargs = case.call(case.batches[0], DTYPE, seed=number)
        rewritten.append(
            check_step(
                original,
                compiled,
                args,
                kwargs,
                dtype=DTYPE,
                seed=100 + number,
                left_alone=Whatever(),
                input_grad=case.input_grad,
            )
        )

    step(0)
    for number, change in enumerate(CHANGES, 1):
        if error := raises(case, [*made, change]):
            lost = pair(case, DTYPE)[1]
            for earlier in (*made, change):
                earlier(lost)
            args, kwargs = case.call(case.batches[0], DTYPE)
            with pytest.raises(error):
                lost(*args, **kwargs)
        elif change(original):
            change(compiled)
            made.append(change)
            step(number)
    assert not case.rewritten or sum(map(bool, rewritten)) > 1  # other rates may fit no pattern
