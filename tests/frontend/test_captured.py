"""What Dynamo's graph has and a traced one has not: modes set inside, effects, shared memory, sizes, symbolic rates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import dropfx
from tests.catalogue.case import mlp
from tests.frontend.steps import captured, captured_eagerly, check, one_backward, slow

INNER = [slow("eager"), "aot_eager"]


@torch.library.custom_op("dropfx_tests::count", mutates_args=("calls",))
def count(x: Tensor, calls: Tensor) -> None:
    calls.add_(1)


@count.register_fake
def _(x: Tensor, calls: Tensor) -> None:
    return None


class Net(nn.Module):
    """48 -> 96 -> 8 with a site between, and a forward of choice."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.inner, self.drop, self.outer = nn.Linear(48, 96), nn.Dropout(0.5), nn.Linear(96, 8)
        self.other = nn.Linear(96, 8)
        self.register_buffer("calls", torch.zeros(1))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def no_grad_inside(m: Net, x: Tensor) -> Tensor:
    h = m.drop(torch.tanh(m.inner(x)))
    with torch.no_grad():
        target = m.outer(h).tanh()
    return m.outer(h) * target


def one_value_with_and_without_gradient(m: Net, x: Tensor) -> Tensor:
    """x is taken compact in both modes."""
    with torch.no_grad():
        still = x.tanh()
    return F.linear(m.drop(still + x.sin()), m.outer.weight[:, :48])


def autocast_inside(m: Net, x: Tensor) -> Tensor:
    h = m.drop(torch.tanh(m.inner(x)))
    with torch.autocast("cpu", torch.bfloat16):
        low = m.outer(h)
    assert low.dtype == torch.bfloat16
    with torch.autocast("cpu", enabled=False):
        return low.float() + m.other(h)


def effect_inside(m: Net, x: Tensor) -> Tensor:
    h = m.inner(x)
    count(h, m.calls)
    return m.outer(m.drop(torch.tanh(h)))


def write_into_a_view(m: Net, x: Tensor) -> Tensor:
    h = m.inner(x)
    rows = h.view(-1)
    rows.mul_(2.0)
    return m.outer(m.drop(torch.tanh(h)))


def write_seen_through_a_view(m: Net, x: Tensor) -> Tensor:
    h = m.inner(x)
    folded = h.view(-1, 4, 24)
    h.mul_(2.0)
    return m.outer(m.drop(torch.tanh(folded.reshape(-1, 96))))


def write_into_half(m: Net, x: Tensor) -> Tensor:
    h = m.inner(x)
    half = h[:, :48]
    half.tanh_()
    return m.outer(m.drop(h))


def sizes_of_a_value(m: Net, x: Tensor) -> Tensor:
    h = m.inner(x)
    folded = h.reshape(-1, 4, 24).tanh().view(h.shape)
    return m.outer(m.drop(folded)) * torch.ones(h.shape[:-1]).unsqueeze(-1)


def weight_dropped_twice(m: Net, x: Tensor) -> Tensor:
    h = m.drop(torch.tanh(m.inner(x)))
    return m.outer(h) + F.linear(m.drop(x), m.other.weight[:, :48])


BODIES: list[tuple[Any, set[str]]] = [
    (no_grad_inside, {"drop"}),
    (one_value_with_and_without_gradient, {"drop"}),
    (effect_inside, {"drop"}),
    (write_into_a_view, {"drop"}),
    (write_seen_through_a_view, {"drop"}),
    (write_into_half, {"drop"}),
    (sizes_of_a_value, {"drop"}),
    (weight_dropped_twice, {"drop", "drop#2"}),
]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("body", "sites"), BODIES, ids=lambda value: getattr(value, "__name__", ""))
def test_body(body: Any, sites: set[str], inner: str) -> None:
    original = Net(body).double()
    compiled = captured(original, inner=inner)
    for rows in (6, 5):
        check(original, compiled, one_backward, torch.randn(rows, 48, dtype=torch.float64), sites=sites)
    assert (original.calls.item() != 0) == (body is effect_inside)


@pytest.mark.parametrize("inner", INNER)
def test_autocast_inside(inner: str) -> None:
    original = Net(autocast_inside)
    compiled = captured(original, inner=inner)
    check(original, compiled, one_backward, torch.randn(6, 48), sites={"drop"}, dtype=torch.bfloat16)


def test_assertion_on_data_stays() -> None:
    def asserted(m: Net, x: Tensor) -> Tensor:
        torch._assert_async(x.sum() > 0)
        return m.outer(m.drop(torch.tanh(m.inner(x))))

    compiled = captured_eagerly(Net(asserted))
    compiled(torch.ones(4, 48))
    with pytest.raises(RuntimeError):
        compiled(-torch.ones(4, 48))


@pytest.mark.parametrize("inner", INNER)
def test_disabled_keeps_all_units(inner: str) -> None:
    """Of what was compiled before, and of what is compiled inside; what no pass rewrites is kept too."""

    def both(m: Net, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5 if m.training else 0.0)[0]
        return m.outer(m.drop(torch.tanh(m.inner(x + y))))

    original, x = Net(both), torch.randn(6, 48)
    want = original.eval()(x)
    original.train()
    for before in (False, True):
        torch._dynamo.reset()
        compiled = captured(original, inner=inner)
        if before:
            compiled(x)
        with dropfx.disabled():
            torch.testing.assert_close(compiled(x), want)
        with dropfx.testing.record() as masks:
            compiled(x)
        assert [set(frame) for frame in masks] == [{"drop"}]


def test_two_models_of_one_step_draw_apart() -> None:
    first, second = mlp(48, 96, 8), mlp(48, 96, 8)

    @torch.compile(backend="dropfx", options={"inner": "eager", "min_speedup": 0})
    def step(x: Tensor) -> Tensor:
        return first(x) + second(x)

    with dropfx.testing.record() as masks:
        step(torch.randn(4, 48))
    a, b = masks[0].values()
    assert not torch.equal(a, b)


def test_selective_checkpoint_keeps_its_policy() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    asked: list[Any] = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        asked.append(op)
        return CheckpointPolicy.MUST_SAVE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    def body(m: Net, x: Tensor) -> Tensor:
        part = nn.Sequential(m.inner, nn.Tanh(), m.drop, m.outer)
        return checkpoint(part, x, use_reentrant=False, context_fn=contexts)

    original = Net(body).double()
    compiled = captured(original)
    with dropfx.testing.record() as masks:
        compiled(torch.randn(6, 48, dtype=torch.float64)).sum().backward()
    assert len(masks[0]) == 1
    assert torch.ops.dropfx.gathered_weight.default in asked


TRANSFORMS: dict[str, Any] = {
    "vmap": lambda m: lambda x: torch.func.vmap(m, randomness="same")(x[None]),
    "grad": lambda m: torch.func.grad(lambda x: m(x).square().sum()),
    "jvp": lambda m: lambda x: torch.func.jvp(m, (x,), (x,))[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_run_as_written(name: str) -> None:
    model, x = mlp(48, 96, 8, activation=nn.Tanh), torch.randn(6, 48)
    given = {"inner": "eager", "min_speedup": 0}
    compiled = torch.compile(TRANSFORMS[name](model), backend="dropfx", options=given)
    plain = torch.compile(TRANSFORMS[name](model), backend="eager")
    with dropfx.testing.record() as masks:
        torch.manual_seed(3)
        ours = compiled(x)
    assert not masks
    torch.manual_seed(3)
    assert torch.equal(ours, plain(x))


class Nested(nn.Module):
    """A checkpoint in a checkpoint, with sites in both and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = mlp(48, 96, 48, activation=nn.Tanh), nn.Dropout(0.5)
        self.inner, self.outer = nn.Linear(48, 48), nn.Linear(48, 8)

    def middle(self, x: Tensor) -> Tensor:
        h = torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)
        return self.inner(self.drop(torch.tanh(h + x)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.utils.checkpoint.checkpoint(self.middle, x, use_reentrant=False)
        return self.outer(F.dropout(h.tanh(), 0.25))


@pytest.mark.parametrize("options", [slow({}), {"groups": 2}, slow({"pattern": "row"})], ids=str)
@pytest.mark.parametrize("dynamic", [True, slow(None)])
@pytest.mark.parametrize("inner", INNER)
def test_checkpoint_in_a_checkpoint(inner: str, dynamic: bool | None, options: dict[str, Any]) -> None:
    original, given = Nested().double(), {"inner": inner, "min_speedup": 0, **options}
    compiled = torch.compile(copy.deepcopy(original), backend="dropfx", dynamic=dynamic, options=given)
    for rows in (6, 5):
        x = torch.randn(rows, 48, dtype=torch.float64)
        check(original, compiled, one_backward, x, sites={"net.2", "drop", ":dropout_1"})
