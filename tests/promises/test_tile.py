"""`tile`: weights drop tiles; promise 2 with `F.linear(x, W) := F.linear(x, W * mask)`."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import dropfx
from dropfx import ops
from dropfx.patterns import Tile
from tests.catalogue.case import mlp


class MaskedWeights(TorchFunctionMode):
    """Dropouts do nothing; the n-th Linear is given the weight mask of its number."""

    def __init__(self, masks: dict[int, Tensor]) -> None:
        super().__init__()
        self.masks, self.linears = masks, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout:
            return args[0]
        if func is F.linear:
            mask = self.masks.get(self.linears)
            self.linears += 1
            if mask is not None:
                args = (args[0], args[1] * mask.to(args[1].dtype), *args[2:])
        return func(*args, **(kwargs or {}))


def gradients(model: nn.Module, x: Tensor, mode: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    with mode:
        out = model(x)
    (out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
    return out.detach(), [x.grad, *(p.grad for p in model.parameters())]


def check(original: nn.Module, x: Tensor, linears: dict[str, int], steps: int = 8, **options: Any) -> None:
    """linears: mask name -> number of the Linear, in the order of the forward."""
    compiled = dropfx.compile(copy.deepcopy(original), **{"pattern": "tile", "min_speedup": 0, **options})
    tolerance = 1e-9 if x.dtype == torch.float64 else 1e-4
    for _ in range(steps):
        with dropfx.testing.record() as recorded:
            out, found = gradients(compiled, x, torch.enable_grad())
        masks = {name: mask for frame in recorded for name, mask in frame.items()}
        assert set(masks) == set(linears)
        expected, wanted = gradients(original, x, MaskedWeights({linears[n]: m for n, m in masks.items()}))
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


class FunctionalDropConnect(nn.Module):
    """`F.linear(x, F.dropout(w), b)`"""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(96, 130), nn.Linear(130, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, F.dropout(self.inner.weight, 0.5, self.training), self.inner.bias)
        return self.outer(torch.tanh(h))


class WeightDrop(nn.Module):
    """A wrapper that drops the weight of the Linear inside."""

    def __init__(self, inner: nn.Linear, p: float) -> None:
        super().__init__()
        self.inner, self.p = inner, p

    def forward(self, x: Tensor) -> Tensor:
        weight = F.dropout(self.inner.weight, self.p, self.training)
        return torch.func.functional_call(self.inner, {"weight": weight}, (x,))


def parametrized() -> nn.Module:
    inner = nn.Linear(96, 130)
    parametrize.register_parametrization(inner, "weight", nn.Dropout(0.5))
    return nn.Sequential(inner, nn.Tanh(), nn.Linear(130, 8))


class Heads(nn.Module):
    """One dropout feeds three Linears: each weight drops tiles, by the same period and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(96, 130), nn.Dropout(0.5)
        self.heads = nn.ModuleList([nn.Linear(130, n) for n in (64, 96, 10)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.inner(x)))
        return torch.cat([head(h) for head in self.heads], dim=-1)


# smooth: in bfloat16 a rounding either way moves a unit across the kink of a ReLU, and its gradient with it
MODELS: dict[str, tuple[Any, dict[str, int]]] = {
    "mlp": (lambda: mlp(96, 130, 67, 8, activation=nn.Tanh), {"2": 1, "5": 2}),
    "functional": (FunctionalDropConnect, {":dropout_1": 0}),
    "weight_drop": (lambda: nn.Sequential(WeightDrop(nn.Linear(96, 64), 0.4), nn.Tanh()), {"0:dropout_1": 0}),
    "parametrized": (parametrized, {"0.parametrizations.weight.0": 0}),
    "heads": (Heads, {"drop[0]": 1, "drop[1]": 2, "drop[2]": 3}),
}


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (7, 5), (1, 1), (200, 8)])
@pytest.mark.parametrize("name", MODELS)
def test_exact_given_the_draw(name: str, shape: tuple[int, int]) -> None:
    build, linears = MODELS[name]
    torch.manual_seed(0)
    if shape == (200, 8) and name == "heads":
        shape = (40, 8)  # a head of ten rows and a wide tile still have several tiles along their columns
    check(build().double(), torch.randn(9, 96, dtype=torch.float64), linears, pattern=Tile(shape))


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.7, 0.9])
def test_rates(rate: float) -> None:
    check(mlp(96, 512, 512, 8, p=rate).double(), torch.randn(5, 96, dtype=torch.float64), {"2": 1, "5": 2}, steps=20)


@pytest.mark.parametrize("shape", [(0, 96), (1, 96), (4, 3, 96), (2, 3, 2, 96)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    check(mlp(96, 130, 67, 8).double(), torch.randn(*shape, dtype=torch.float64), {"2": 1, "5": 2})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_is_zero_at_dropped_tiles(dtype: torch.dtype) -> None:
    model = dropfx.compile(mlp(64, 128, 96, 8).to(dtype), pattern="tile", min_speedup=0)
    for _ in range(5):
        model.zero_grad()
        with dropfx.testing.record() as recorded:
            model(torch.randn(16, 64, dtype=dtype)).sum().backward()
        assert not model[3].weight.grad[recorded[0]["2"] == 0].any()


def test_every_tile_is_kept_equally_often_and_no_column_shares_its_fate() -> None:
    """128 columns are 4 tiles: for period 2 the numbering of the paper would drop whole columns."""
    model = dropfx.compile(mlp(64, 128, 256, 8), pattern=Tile(max_period=2), min_speedup=0)
    whole = defaultdict(int)
    for _ in range(50):
        with dropfx.testing.record() as recorded:
            model(torch.randn(2, 64))
        mask = recorded[0]["2"]
        whole[bool((mask == 0).all(dim=0).any())] += 1
    assert not whole[True]


def test_autocast_and_assert_equivalent() -> None:
    options = {"pattern": "tile", "min_speedup": 0}
    torch.manual_seed(0)
    for build, _ in MODELS.values():
        dropfx.testing.assert_equivalent(build(), torch.randn(6, 96), options=options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dropfx.testing.assert_equivalent(build(), torch.randn(6, 96), options=options)


def test_second_derivative() -> None:
    model = dropfx.compile(mlp(8, 16, 12, 3).double(), pattern=Tile((4, 4)), min_speedup=0)
    weight = model[3].weight

    def penalty(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        (gradient,) = torch.autograd.grad(model(x).tanh().sum(), weight, create_graph=True)
        return gradient.square().sum()

    assert torch.autograd.gradcheck(penalty, torch.randn(5, 8, dtype=torch.float64, requires_grad=True))


def test_eval_is_untouched_and_restore_undoes() -> None:
    original = mlp(96, 130, 67, 8)
    compiled = dropfx.compile(copy.deepcopy(original), pattern="tile", min_speedup=0).eval()
    x = torch.randn(4, 96)
    assert torch.equal(compiled(x), original.eval()(x))
    assert type(dropfx.restore(compiled)) is nn.Sequential


def test_what_is_left_alone() -> None:
    class Normed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[1](self[0](x))
            return self[2](h) + self[3](h)

    options = {"pattern": "tile", "min_speedup": 0}
    normed = Normed(nn.Linear(64, 64), nn.Dropout(), nn.Linear(64, 64), nn.LayerNorm(64))
    (site,) = dropfx.explain(normed, torch.randn(4, 64), options=options).sites
    assert (site.rewritten, site.reason.split(",")[0]) == (False, "its output is not read by Linears alone")
    (site,) = dropfx.explain(mlp(64, 20, 8), torch.randn(4, 64), options=options).sites
    assert (site.rewritten, "single 32x32 tile" in site.reason) == (False, True)
    (site,) = dropfx.explain(mlp(64, 128, 8), torch.randn(4, 64), options={"pattern": "tile"}).sites
    assert "below min_speedup" in site.reason
    channels = nn.Sequential(nn.Dropout2d(), nn.Flatten(2), nn.Linear(64, 8))
    (site,) = dropfx.explain(channels, torch.randn(4, 3, 8, 8), options=options).sites
    assert "channels" in site.reason


def test_weights_are_left_alone_by_patterns_of_units() -> None:
    (site,) = dropfx.explain(FunctionalDropConnect(), torch.randn(4, 96), options={"min_speedup": 0}).sites
    assert (site.rewritten, "pattern='tile'" in site.reason) == (False, True)


@pytest.mark.parametrize("options", [{"groups": 2}, {"block": 8}])
def test_options_that_do_not_fit(options: dict[str, int]) -> None:
    with pytest.raises(dropfx.InvalidOption):
        dropfx.compile(mlp(64, 128, 8), pattern="tile", **options)


@pytest.mark.parametrize(("shape", "period"), [((64, 96), 1), ((33, 70), 2), ((10, 40), 3), ((10, 40), 5)])
def test_registered_op(shape: tuple[int, int], period: int) -> None:
    torch.manual_seed(0)
    lattice = torch.tensor([period, 1 % period])
    x = torch.randn(3, 4, shape[1], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[0], dtype=torch.float64, requires_grad=True)
    for given in (bias, None):
        arguments = (x, weight, given, 16, 8, lattice, 1.5)
        torch.library.opcheck(ops.tiled_linear_op, arguments)
        torch.testing.assert_close(ops.tiled_linear_op(*arguments), ops.EAGER[ops.tiled_linear_op](*arguments))
    assert torch.autograd.gradcheck(
        lambda *a: ops.EAGER[ops.tiled_linear_op](*a, 16, 8, lattice, 1.5), (x, weight, bias)
    )
