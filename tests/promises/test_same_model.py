"""Promise 6: the same model. Identity, class, keys, copies, moves, optimizers."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import ClassVar, get_type_hints

import pytest
import torch
from torch import nn

import dropfx
from tests.catalogue import CASES
from tests.catalogue.case import check_step, mlp, pair, recording
from tests.catalogue.nets import Net, SubNet, example, nets, recorded_sites
from tests.oracle import comparison, oracle


def test_compile_returns_the_same_object() -> None:
    model = Net()
    attributes = dict(model.__dict__)
    assert dropfx.compile(model) is model
    assert all(model.__dict__[name] is value for name, value in attributes.items())


@pytest.mark.parametrize("traced", [False, True])
def test_class_and_looks(traced: bool) -> None:
    original, compiled = nets(SubNet)
    if traced:
        compiled(example())
    assert isinstance(compiled, SubNet)
    assert isinstance(compiled, Net)
    assert type(compiled).__name__ == "SubNet"
    assert repr(compiled) == repr(original)
    assert str(compiled) == str(original)
    assert list(compiled.state_dict()) == list(original.state_dict())
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in original.named_modules()]
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in original.named_parameters()]
    assert [name for name, _ in compiled.named_buffers()] == [name for name, _ in original.named_buffers()]
    assert set(dir(original)) <= set(dir(compiled))


def test_children_keep_their_classes() -> None:
    _, compiled = nets()
    compiled(example())
    assert [type(child) for child in compiled.children()] == [nn.Linear, nn.Dropout, nn.Linear]


def test_parameters_stay_the_same_objects() -> None:
    model = Net()
    parameters = list(model.parameters())
    dropfx.compile(model, min_speedup=0)(torch.randn(2, 64))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_methods_properties_and_class_attributes() -> None:
    _, compiled = nets()
    assert (compiled.width, compiled.kind) == (96, "net")
    made = compiled.make(32)
    assert isinstance(made, Net)
    assert made.width == 32
    compiled.note = "kept"
    assert compiled.note == "kept"
    del compiled.note
    assert not hasattr(compiled, "note")


@pytest.mark.parametrize("kind", [Net, SubNet])
def test_inherited_forward(kind: type[Net]) -> None:
    assert set(check_step(*nets(kind), (example(),), dtype=torch.float64)) == {"drop"}


def test_methods_that_call_the_model() -> None:
    original, compiled = nets()
    with recording() as masks:
        loss = compiled.loss(example())
    assert set(masks) == {"drop"}
    with oracle.replaced_dropout(original, masks):
        assert not comparison.difference(loss.detach(), original.loss(example()).detach(), 1e-10, 0.0)


def test_forward_called_directly() -> None:
    _, compiled = nets()
    with recording() as masks:
        compiled.forward(example())
    assert set(masks) == {"drop"}


def test_sequential_stays_a_sequence() -> None:
    compiled = dropfx.compile(mlp(64, 96, 96, 8).double(), min_speedup=0)
    x = example()
    compiled(x)
    assert len(compiled) == 7
    assert isinstance(compiled[0], nn.Linear)
    assert [type(layer) for layer in compiled][:2] == [nn.Linear, nn.ReLU]
    head = compiled[:4]
    assert isinstance(head, nn.Sequential)
    head.eval()
    assert torch.equal(head(x), compiled[3](compiled[1](compiled[0](x))))
    head.train()
    assert head(x).shape == (4, 96)


def test_type_of_self_builds_a_usable_model() -> None:
    _, compiled = nets()
    other = type(compiled)(32).double()
    assert isinstance(other, Net)
    assert other(example()).shape == (4, 8)


# Copies


@pytest.mark.parametrize("traced", [False, True])
def test_deepcopy_is_compiled_and_independent(traced: bool) -> None:
    original, compiled = nets()
    if traced:
        compiled(example())
    copied = copy.deepcopy(compiled)
    assert type(copied) is type(compiled)
    assert all(a is not b for a, b in zip(copied.parameters(), compiled.parameters(), strict=True))
    with torch.no_grad():
        compiled.lin1.weight.zero_()
    compiled.drop.p = 0.25
    assert set(check_step(original, copied, (example(),), dtype=torch.float64)) == {"drop"}
    assert all(parameter.grad is None for parameter in compiled.parameters())


def test_restoring_a_copy_leaves_the_first_compiled() -> None:
    _, compiled = nets()
    copied = copy.deepcopy(compiled)
    dropfx.restore(copied)
    assert type(copied) is Net
    assert recorded_sites(compiled) == {"drop"}
    assert recorded_sites(copied) == set()


def test_pickle_in_this_process() -> None:
    original, compiled = nets()
    compiled(example())
    loaded = pickle.loads(pickle.dumps(compiled))
    assert isinstance(loaded, Net)
    assert set(check_step(original, loaded, (example(),), dtype=torch.float64)) == {"drop"}


def test_state_dict_moves_between_compiled_and_plain() -> None:
    original, compiled = nets()
    original.load_state_dict(compiled.state_dict(), strict=True)
    compiled.load_state_dict(Net().double().state_dict(), strict=True)
    original.load_state_dict(compiled.state_dict())
    check_step(original, compiled, (example(),), dtype=torch.float64)
    compiled.load_state_dict({k: v.clone() for k, v in original.state_dict().items()}, assign=True)
    check_step(original, compiled, (example(),), dtype=torch.float64)


# Moves


def test_to_another_dtype_and_back() -> None:
    original, compiled = pair(CASES["mlp"])
    for dtype in (torch.float32, torch.float64, torch.float32):
        args, _ = CASES["mlp"].call(4, dtype)
        masks = check_step(original.to(dtype), compiled.to(dtype), args, dtype=dtype)
        assert set(masks) == {"2", "5"}
    assert compiled.double() is compiled


def test_train_returns_the_model() -> None:
    _, compiled = nets()
    assert compiled.train() is compiled
    assert compiled.eval() is compiled
    assert compiled.requires_grad_(False) is compiled
    assert compiled.apply(lambda module: None) is compiled


def test_lazy_model_is_compiled_before_its_first_call() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(96), nn.Tanh(), nn.Dropout(0.5), nn.LazyLinear(8)).double()

    compiled = dropfx.compile(build(), min_speedup=0)
    assert compiled(example()).shape == (4, 8)
    assert [type(module) for module in compiled] == [nn.Linear, nn.Tanh, nn.Dropout, nn.Linear]
    original = build()
    original(example())
    original.load_state_dict(compiled.state_dict())
    assert set(check_step(original, compiled, (example(),), dtype=torch.float64)) == {"2"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_optimizer_made_before_or_after(when: str) -> None:
    original, compiled = Net().double(), Net().double()
    compiled.load_state_dict(original.state_dict())
    make = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    steppers = [make(original.parameters())]
    if when == "before":
        steppers.append(make(compiled.parameters()))
    dropfx.compile(compiled, min_speedup=0)
    if when == "after":
        steppers.append(make(compiled.parameters()))
    for step in range(4):
        check_step(original, compiled, (example(seed=step),), dtype=torch.float64, seed=step)
        for stepper in steppers:
            stepper.step()


class Listed(nn.Module):
    """Keeps a list of its subclasses and reads their annotations, as Hugging Face's base class does."""

    seen: ClassVar[list[str]] = []

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        get_type_hints(cls)
        Listed.seen.append(cls.__qualname__)


class ListedNet(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 96, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_hooks_of_class_creation_do_not_see_the_swapped_class() -> None:
    model = dropfx.compile(ListedNet(), min_speedup=0)
    with recording() as masks:
        model(torch.randn(2, 64))
    assert set(masks) == {"net.2"}
    assert Listed.seen == ["ListedNet"]
