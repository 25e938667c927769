"""Promise 2 under everything that repeats, delays, adds up or recomputes a forward or a backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dropfx
from tests.catalogue.case import mlp
from tests.frontend.steps import FRONT_ENDS, Call, captured, check, one_backward, slow
from tests.oracle import comparison, oracle

SITES = {"2", "5"}


@pytest.fixture(params=[slow(name) if name == "backend_eager" else name for name in FRONT_ENDS])
def front(request: pytest.FixtureRequest) -> Any:
    return FRONT_ENDS[request.param]


def tanh_mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    return mlp(48, 96, 64, 8, activation=nn.Tanh).to(dtype)


def batch(rows: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 48, dtype=dtype)


def two_forwards(call: Call, model: nn.Module, x: Tensor) -> Tensor:
    y, z = call(x), call(-x)
    (y.square().sum() + z.sum()).backward()
    return y + z


def accumulated(call: Call, model: nn.Module, x: Tensor) -> Tensor:
    for part in x.detach().chunk(3):
        (call(part).square().sum() / 3).backward()
    return x


def retained(call: Call, model: nn.Module, x: Tensor) -> Tensor:
    y = call(x)
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()
    return y


def scaled(call: Call, model: nn.Module, x: Tensor) -> Tensor:
    """Mixed precision by the book: scaled loss, unscaled gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    y = call(x)
    scaler.scale(y.square().sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0  # no infinity found
    return y


def clipped(call: Call, model: nn.Module, x: Tensor) -> Tensor:
    y = call(x)
    y.square().sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return y


STEPS = [(two_forwards, 2), (accumulated, 3), (retained, 1), (scaled, 1), (clipped, 1)]


@pytest.mark.parametrize(("step", "forwards"), STEPS, ids=lambda value: getattr(value, "__name__", ""))
def test_step(front: Any, step: Any, forwards: int) -> None:
    original = tanh_mlp()
    masks = check(original, front(original), step, batch(), sites=SITES, forwards=forwards)
    assert all(not torch.equal(masks[0]["2"], other["2"]) for other in masks[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(front: Any, dtype: torch.dtype) -> None:
    def step(call: Call, model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            y = call(x)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        assert model.get_parameter(next(iter(dict(model.named_parameters())))).grad.dtype == torch.float32
        return y

    original = tanh_mlp(torch.float32)
    check(original, front(original), step, batch(dtype=torch.float32), sites=SITES, dtype=dtype)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_the_model(front: Any, reentrant: bool) -> None:
    def step(call: Call, model: nn.Module, x: Tensor) -> Tensor:
        y = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=reentrant)
        y.square().sum().backward()
        return y

    original = tanh_mlp()
    check(original, front(original), step, batch(), sites=SITES)


class Checkpointed(nn.Module):
    """Two checkpointed parts behind a Linear, and a site outside of them."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.drop, self.outer = nn.Linear(48, 64), nn.Dropout(0.5), nn.Linear(64, 8)
        self.parts = nn.ModuleList(mlp(64, 96, 64, activation=nn.Tanh) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for part in self.parts:
            x = x + torch.utils.checkpoint.checkpoint(part, x, use_reentrant=self.reentrant)
        return self.outer(self.drop(torch.tanh(x)))


@pytest.mark.parametrize(
    ("reentrant", "options"),
    [
        *[(False, {}), (True, {"groups": 2}), (False, {"pattern": "row"})],
        *[slow(True, {}), slow(False, {"groups": 2}), slow(True, {"pattern": "row"})],
    ],
    ids=str,
)
def test_checkpoints_inside_of_a_captured_graph(reentrant: bool, options: dict[str, Any]) -> None:
    """Their bodies are rewritten too, with the draws as operands."""
    original = Checkpointed(reentrant).double()
    for inner in ("eager", "aot_eager"):
        compiled = captured(original, inner=inner, **options)
        for rows in (6, 5):
            check(original, compiled, one_backward, batch(rows), sites={"drop", "parts.0.2", "parts.1.2"})


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_functional_call(name: str) -> None:
    original = tanh_mlp()
    compiled = FRONT_ENDS[name](original)
    prefix = "" if name == "compile" else "_orig_mod."
    given = {key: (0.5 * value).detach().requires_grad_() for key, value in original.named_parameters()}
    x = batch()
    with dropfx.testing.record() as masks:
        y = torch.func.functional_call(compiled, {prefix + key: value for key, value in given.items()}, (x,))
    got = torch.autograd.grad(y.square().sum(), list(given.values()))
    assert [set(frame) for frame in masks] == [SITES]
    with oracle.replaced_dropout(original, masks[0]):
        want = torch.func.functional_call(original, given, (x,))
    assert not comparison.difference(y.detach(), want.detach(), 1e-10, 0.0)
    for ours, theirs in zip(got, torch.autograd.grad(want.square().sum(), list(given.values())), strict=True):
        assert not comparison.difference(ours, theirs, 1e-10, 0.0)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_caches_off_and_on(inner: str, enabled: bool) -> None:
    counters.clear()
    original = tanh_mlp()
    functorch, inductor = torch._functorch.config, torch._inductor.config
    for _ in range(2):  # the second time out of the cache
        torch._dynamo.reset()
        with functorch.patch(enable_autograd_cache=enabled), inductor.patch(force_disable_caches=not enabled):
            compiled = captured(original, inner=inner)
            first, second = (check(original, compiled, one_backward, batch(), sites=SITES) for _ in range(2))
        assert not torch.equal(first[0]["2"], second[0]["2"])
    if inner == "inductor":
        found = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        assert (found > 0) == enabled


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_mode(mode: str) -> None:
    """As large as its prediction needs: torch.compile takes no options beside a mode."""
    original = mlp(256, 1024, 1024, 8, activation=nn.Tanh).double()
    compiled = torch.compile(copy.deepcopy(original), backend="dropfx", mode=mode)
    for _ in range(3):
        check(original, compiled, one_backward, torch.randn(64, 256).double(), sites=SITES)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.3, 0.0])
def test_inductor_recomputes(budget: float) -> None:
    original = tanh_mlp()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled = captured(original, inner="inductor")
        for _ in range(3):
            check(original, compiled, one_backward, batch(), sites=SITES)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_inductor_checkpoints(reentrant: bool) -> None:
    original = Checkpointed(reentrant).double()
    compiled = captured(original, inner="inductor")
    for _ in range(2):
        check(original, compiled, one_backward, batch(), sites={"drop", "parts.0.2", "parts.1.2"})
