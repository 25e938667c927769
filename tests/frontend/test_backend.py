"""`torch.compile(model, backend="dropfx")`: promise 2 for the graphs that Dynamo captures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional as F

import dropfx
from dropfx.patterns import Row
from tests.catalogue.case import mlp, recording
from tests.oracle import comparison, oracle


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiled_pair(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    given = {"inner": "aot_eager", "min_speedup": 0, **options}
    return model, torch.compile(copy.deepcopy(model), backend="dropfx", options=given)


def check_step(original: nn.Module, compiled: nn.Module, x: Tensor, **around: Any) -> oracle.Masks:
    masks: oracle.Masks = {}
    with recording() as recorded:
        actual = oracle.run(compiled, (x,))
    masks.update(recorded)
    expected = oracle.oracle_run(original, masks, (x,))
    renamed = {path.removeprefix("_orig_mod."): value for path, value in actual.grads.items()}
    actual.grads, actual.parameters = renamed, {k.removeprefix("_orig_mod."): v for k, v in actual.parameters.items()}
    actual.buffers = {k.removeprefix("_orig_mod."): v for k, v in actual.buffers.items()}
    comparison.compare(actual, expected, x.dtype, True)
    return masks


class Reshaping(nn.Module):
    """The width of what is kept is named in a view."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.outer = nn.Linear(48, 96), nn.Dropout(0.5), nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.drop(self.inner(x)).reshape(x.size(0) * x.size(1), 96))


class Attention(nn.Module):
    """q/k/v from one dropout, a residual branch, functional dropout with self.p, views on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.p = nn.Linear(64, 64), nn.Dropout(0.5), 0.3
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(F.gelu(self.inner(x)))
        q, k, v = (f(h).view(*x.shape[:2], 4, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + F.dropout(self.out(mixed.transpose(1, 2).reshape(x.shape)), self.p, self.training)


OPTIONS = [
    {},
    {"pattern": "slice"},
    {"block": 7},
    {"groups": 2},
    {"pattern": "row"},
    {"pattern": Row(scale="period")},
    {"pattern": "row", "groups": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exact_given_the_draw_without_recompiling(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    original, compiled = compiled_pair(mlp(48, 96, 96, 8).double(), **options)
    for step, batch in enumerate((4, 6, 7, 4, 5, 9, 11, 2)):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            masks = check_step(original, compiled, torch.randn(batch, 48, dtype=torch.float64))
        assert set(masks) == {"2", "5"}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_and_residual(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    original, compiled = compiled_pair(Attention().double(), **options)
    for shape in ((3, 5), (4, 6), (2, 7)):
        masks = check_step(original, compiled, torch.randn(*shape, 64, dtype=torch.float64))
        assert set(masks) == {"drop", ":dropout_1"}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_views(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    original, compiled = compiled_pair(Reshaping().double(), **options)
    for shape in ((3, 5), (4, 6), (2, 7), (3, 5)):
        check_step(original, compiled, torch.randn(*shape, 48, dtype=torch.float64))


def test_tiles() -> None:
    torch.manual_seed(0)
    original, compiled = compiled_pair(mlp(64, 96, 70, 8).double(), pattern="tile")
    for step in range(12):
        x = torch.randn(5, 64, dtype=torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=step > 0), recording() as masks:
            out = compiled(x)
        out.square().sum().backward()
        h = F.relu(original[0](x))
        for place in (3, 6):
            h = F.linear(h, original[place].weight * masks[str(place - 1)], original[place].bias)
            h = F.relu(h) if place == 3 else h
        h.square().sum().backward()
        torch.testing.assert_close(out, h)
        for ours, theirs in zip(compiled.parameters(), original.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        compiled.zero_grad(), original.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_inductor(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    original, compiled = compiled_pair(mlp(48, 96, 96, 8), inner="inductor", **options)
    for step, batch in enumerate((4, 6, 7, 4)):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            check_step(original, compiled, torch.randn(batch, 48))


def test_one_graph() -> None:
    whole = torch.compile(
        mlp(48, 96, 8), backend="dropfx", fullgraph=True, options={"inner": "eager", "min_speedup": 0}
    )
    with recording() as masks:
        whole(torch.randn(4, 48))
    assert set(masks) == {"2"}


@pytest.mark.parametrize("budget", [0.3, 0.0])
def test_forward_and_backward_share_a_draw_where_the_partitioner_recomputes(budget: float) -> None:
    torch.manual_seed(0)
    original, compiled = compiled_pair(mlp(48, 96, 96, 8).double())
    with torch._functorch.config.patch(activation_memory_budget=budget):
        for _ in range(4):
            check_step(original, compiled, torch.randn(4, 48, dtype=torch.float64))


def test_same_input_twice_draws_twice() -> None:
    """R-Drop."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(48, 96, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) - self.net(x)

    _, compiled = compiled_pair(Twice())
    with recording() as masks:
        out = compiled(torch.randn(4, 48))
    assert set(masks) == {"net.2", "net.2#2"}
    assert not torch.equal(masks["net.2"], masks["net.2#2"])
    assert out.any()


def test_eval_is_the_inner_compilers_and_switching_works() -> None:
    model = mlp(48, 96, 8)
    compiled = torch.compile(model, backend="dropfx", options={"inner": "aot_eager", "min_speedup": 0})
    plain = torch.compile(copy.deepcopy(model).eval(), backend="aot_eager")
    x = torch.randn(4, 48)
    compiled.train()(x)
    assert torch.equal(compiled.eval()(x), plain(x))
    with recording() as masks:
        compiled.train()(x)
    assert set(masks) == {"2"}


def test_draws_as_compile_does() -> None:
    """One seed, one draw: whichever front end."""
    model, x = mlp(48, 96, 96, 8), torch.randn(4, 48)
    eager = dropfx.compile(copy.deepcopy(model), min_speedup=0)
    _, compiled = compiled_pair(model)
    found = []
    for runnable in (eager, compiled):
        runnable(x)
        torch.manual_seed(5)
        with recording() as masks:
            runnable(x)
        found.append(masks)
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("2", "5"))


def test_small_layers_are_left_to_the_inner_compiler() -> None:
    compiled = torch.compile(mlp(16, 16, 4), backend="dropfx", options={"inner": "eager"})
    with recording() as masks:
        compiled(torch.randn(4, 16))
    assert not masks


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_the_output_may_be_changed_in_place(inner: str) -> None:
    """In later calls too: AOTAutograd's first call returns other tensors than the rest."""
    _, compiled = compiled_pair(mlp(48, 96, 96, 8), inner=inner)
    for _ in range(3):
        y = compiled(torch.randn(4, 48))
        y.mul_(3.0).sum().backward()


class Rows(nn.Module):
    """As many results as rows: the compiler takes their count for granted, and of a product by it the kept units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(16, 48), nn.Dropout(0.5), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.drop(torch.tanh(self.first(torch.cat([x, x], 1)))))
        return torch.stack(h.reshape(-1, 48).unbind(-2), -2)


def test_what_a_compiler_takes_for_granted_of_a_draw_is_no_guard() -> None:
    original, compiled = compiled_pair(Rows().double(), pattern="row", groups=1)
    assert check_step(original, compiled, torch.randn(6, 12, 16, dtype=torch.float64)).keys() == {"drop"}
    x = torch.randn(8, 5, 16, dtype=torch.float64)
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match="took for granted how many units are kept"):
        found = compiled(x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, original(x))
