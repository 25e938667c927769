"""Promise 6: the same model. Identity, class, keys, copies, optimizers, hooks, restore."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor, nn

import dropfx
from tests import oracle
from tests.case import check_step, mlp, pair, recording
from tests.models import CASES
from tests.models_hooks import HOOKS, Nested, calls


class Net(nn.Module):
    """A model with methods, properties, class attributes and a mangled name."""

    kind = "net"

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.lin1, self.drop, self.lin2 = nn.Linear(64, width), nn.Dropout(0.5), nn.Linear(width, 8)
        self.__secret = 2.0

    @property
    def width(self) -> int:
        return self.lin1.out_features

    @classmethod
    def make(cls, width: int) -> Net:
        return cls(width)

    @staticmethod
    def square(x: Tensor) -> Tensor:
        return x.square()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.drop(torch.tanh(self.lin1(x)))) * self.__secret

    def loss(self, x: Tensor) -> Tensor:
        return self.square(self(x)).sum()

    def extra_repr(self) -> str:
        return f"width={self.width}"


class SubNet(Net):
    """Calls its parent's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def nets(kind: type[Net] = Net) -> tuple[nn.Module, nn.Module]:
    original, compiled = kind().double(), kind().double()
    compiled.load_state_dict(original.state_dict())
    return original, dropfx.compile(compiled, min_speedup=0)


def example(batch: int = 4, seed: int = 0) -> Tensor:
    return CASES["mlp"].call(batch, torch.float64, seed)[0][0]


def recorded_sites(model: nn.Module, x: Tensor | None = None) -> set[str]:
    with recording() as masks:
        model(example() if x is None else x)
    return set(masks)


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
        assert not oracle.difference(loss.detach(), original.loss(example()).detach(), 1e-10, 0.0)


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


# Hooks


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("path", ["", "body", "body.0", "body.2", "drop"])
def test_hook_added_after_tracing(path: str, hook: str) -> None:
    """Runs once a call from then on, and no more once it is removed."""
    original, compiled = Nested().double(), Nested().double()
    compiled.load_state_dict(original.state_dict())
    dropfx.compile(compiled, min_speedup=0)
    sites = ("body.2", "drop", "head.2")
    step = functools.partial(check_step, original, compiled, (example(),), dtype=torch.float64, left_alone=sites)
    step()
    handles = [HOOKS[hook](model.get_submodule(path)) for model in (original, compiled)]
    step()
    step()
    counted = calls(compiled)
    assert counted == calls(original)
    assert sum(counted[path].values()) == 2
    for handle in handles:
        handle.remove()
    assert set(step()) == set(sites)
    assert calls(compiled) == counted


def test_parameter_and_tensor_hooks() -> None:
    original, compiled = nets()
    for model in (original, compiled):
        model.lin1.weight.register_hook(lambda grad: 3.0 * grad)
    check_step(original, compiled, (example(),), dtype=torch.float64)


def test_accumulation_hooks_run_once() -> None:
    _, compiled = nets()
    seen: list[Tensor] = []
    for parameter in compiled.parameters():
        parameter.register_post_accumulate_grad_hook(seen.append)
    compiled(example()).sum().backward()
    assert len(seen) == 4


# Restore, compile twice, compile a part


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
