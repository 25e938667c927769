"""The ops by kernels against their twins, and whole models lowered to them; in Triton's interpreter without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

import dropfx
from dropfx import kernels, ops
from dropfx.errors import DoubleBackwardError
from dropfx.ops import triton_ops
from dropfx.ops.triton_ops import FROM_OUTPUT, KERNELS, activated_linear_op
from tests.catalogue.case import mlp

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STARTS = torch.tensor([0, 16, 24], device=DEVICE)  # of 8 in 32 units
RAGGED = torch.tensor([0, 8, 24], device=DEVICE)  # of 8 in 30 units
GROUPED = torch.stack([STARTS, STARTS.flip(0), STARTS])


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=True)


def cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    lattice = torch.tensor([2, 1])
    linear = ops.linear_op
    return {
        "linear, cols": (linear, (leaf(2, 3, 24), leaf(20, 32), leaf(20), None, 0, STARTS, 8, 1.5)),
        "linear, transposed": (
            linear,
            (leaf(6, 24), leaf(32, 20).t().detach().requires_grad_(), None, None, 0, STARTS, 8, 1.0),
        ),
        "linear, rows": (linear, (leaf(6, 20), leaf(32, 20), None, STARTS, 8, None, 0, 1.0)),
        "linear, ragged": (linear, (leaf(6, 20), leaf(30, 20), leaf(30), RAGGED, 8, None, 0, 1.0)),
        "linear, groups": (linear, (leaf(5, 2, 24), leaf(20, 32), leaf(20), None, 0, GROUPED, 8, 1.5, 0, 5)),
        "linear, two leading axes": (linear, (leaf(10, 24), leaf(32, 32), None, GROUPED, 8, GROUPED, 8, 1.0, 10, 5)),
        "tiled": (ops.tiled_linear_op, (leaf(6, 32), leaf(20, 32), leaf(20), 8, 4, lattice, 1.5)),
        "gather": (ops.gather_op, (leaf(4, 32), STARTS, 8, -1)),
        "take, other axis": (ops.gather_op, (leaf(2, 32, 3), STARTS, 8, 1)),
        "take, groups": (ops.gather_op, (leaf(5, 2, 32), GROUPED, 8, -1, 5)),
        "scatter": (ops.scatter_op, (leaf(4, 24), STARTS, 8, -1, 32)),
        "put, ragged": (ops.scatter_op, (leaf(4, 24), RAGGED, 8, -1, 30)),
        "put, groups": (ops.scatter_op, (leaf(5, 2, 24), GROUPED, 8, -1, 32, 5)),
        "residual": (ops.residual_add_op, (leaf(4, 32), leaf(4, 24), STARTS, 8, -1, 32, 0.5)),
        "residual, broadcast": (ops.residual_add_op, (leaf(32), leaf(4, 24), STARTS, 8, -1, 32, 1.0)),
        "residual, larger": (ops.residual_add_op, (leaf(2, 4, 32), leaf(4, 24), STARTS, 8, -1, 32, 1.0)),
    }


def run(op: Any, args: tuple[Any, ...]) -> list[Tensor]:
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    out = op(*args)
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("name", cases())
def test_twins_agree(name: str) -> None:
    op, args = cases()[name]
    assert KERNELS[op] is not op
    for ours, theirs in zip(run(KERNELS[op], args), run(op, args), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("name", ["linear, cols", "linear, transposed", "tiled", "gather", "scatter", "residual"])
def test_opcheck(name: str) -> None:
    op, args = cases()[name]
    opcheck(KERNELS[op], args)


LINEARS = [name for name in cases() if name.startswith("linear")]


def activated(args: tuple[Any, ...], activation: str) -> tuple[Any, ...]:
    return (*args[:8], activation, *args[8:])


@pytest.mark.parametrize("activation", FROM_OUTPUT)
@pytest.mark.parametrize("name", LINEARS)
def test_activation_in_the_product(name: str, activation: str) -> None:
    op, args = cases()[name]
    ours = run(activated_linear_op, activated(args, activation))
    theirs = run(lambda *a: FROM_OUTPUT[activation].function(op(*a)), args)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_activation_in_the_product_opcheck() -> None:
    opcheck(activated_linear_op, activated(cases()["linear, rows"][1], "relu"))
    opcheck(activated_linear_op, activated(cases()["linear, groups"][1], "tanh"))


def test_activation_in_the_product_in_double_precision() -> None:
    """By the reference."""
    op, args = cases()["linear, cols"]
    wide = tuple(a.detach().double().requires_grad_() if isinstance(a, Tensor) and a.requires_grad else a for a in args)
    theirs = run(lambda *a: torch.tanh(op(*a)), wide)
    for mine, other in zip(run(activated_linear_op, activated(wide, "tanh")), theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_activation_in_the_product_under_autocast() -> None:
    args = activated(cases()["linear, rows"][1], "relu")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert activated_linear_op(*args).dtype == torch.bfloat16


@pytest.mark.parametrize(("build", "fused"), [(nn.ReLU, 2), (nn.Tanh, 2), (nn.GELU, 0)])
def test_activations_of_a_model_are_fused(build: Any, fused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    product = dropfx.kernels.gathered_matmul
    monkeypatch.setattr(
        dropfx.kernels, "gathered_matmul", lambda *a, **k: (asked.append(k.get("activation")), product(*a, **k))[1]
    )
    model = dropfx.compile(mlp(24, 40, 64, 8, activation=build).to(DEVICE), lowering="triton", min_speedup=0)
    model(torch.randn(6, 24, device=DEVICE))
    assert sum(name != "none" for name in asked) == fused


@pytest.mark.parametrize("name", ["linear, cols", "tiled"])
def test_double_precision_goes_to_the_reference(name: str) -> None:
    op, args = cases()[name]
    wide = tuple(a.detach().double().requires_grad_() if isinstance(a, Tensor) and a.requires_grad else a for a in args)
    for ours, theirs in zip(run(KERNELS[op], wide), run(op, wide), strict=True):
        assert torch.equal(ours, theirs)


def test_a_cpu_beside_a_gpu_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interpreter no kernel runs on the CPU."""
    monkeypatch.setattr(triton_ops, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "gathered_matmul", None)
    x, weight = torch.randn(6, 24), torch.randn(20, 32)
    args = (x, weight, None, None, 0, STARTS.cpu(), 8, 1.0)
    assert torch.equal(KERNELS[ops.linear_op](*args), ops.linear_op(*args))


def test_the_second_derivative_is_a_named_error() -> None:
    op, args = cases()["linear, rows"]
    (grad,) = torch.autograd.grad(KERNELS[op](*args).square().sum(), args[0], create_graph=True)
    with pytest.raises(DoubleBackwardError, match="lowering='aten'"):
        grad.sum().backward()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.drop = nn.Linear(32, 64), nn.Linear(64, 32), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.outer(self.drop(self.inner(x).tanh())))


@pytest.mark.parametrize(
    "options",
    [{}, {"pattern": "slice"}, {"pattern": "row"}, {"pattern": "tile"}, {"groups": 3}, {"block": 7}],
    ids=str,
)
@pytest.mark.parametrize("build", [lambda: mlp(24, 40, 64, 8, activation=nn.Tanh), Residual], ids=["mlp", "residual"])
def test_exact_given_the_draw(build: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build().to(DEVICE)
    options = {"lowering": "triton", "min_speedup": 0, **options}
    x = torch.randn(6, 24 if isinstance(model, nn.Sequential) else 32, device=DEVICE)
    dropfx.testing.assert_equivalent(model, x, options=options)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        dropfx.testing.assert_equivalent(model, x, options=options)


def test_lowered_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    linear = dropfx.kernels.gathered_matmul
    monkeypatch.setattr(
        dropfx.kernels, "gathered_matmul", lambda *a, **k: (called.append("kernel"), linear(*a, **k))[1]
    )
    for lowering, launches in (("aten", 0), ("triton", 6)):
        called.clear()
        model = dropfx.compile(mlp(24, 40, 64, 8).to(DEVICE), lowering=lowering, min_speedup=0)
        model(torch.randn(6, 24, device=DEVICE, requires_grad=True)).sum().backward()
        assert len(called) == launches


@pytest.mark.parametrize("pattern", ["block", "tile"])
def test_under_the_compiler(pattern: str) -> None:
    torch._dynamo.reset()
    model = mlp(24, 40, 64, 8).to(DEVICE)
    options = {"lowering": "triton", "min_speedup": 0, "pattern": pattern}
    compiled = torch.compile(model, backend="dropfx", options={**options, "inner": "aot_eager"})
    plain = dropfx.compile(mlp(24, 40, 64, 8).to(DEVICE), lowering="aten", min_speedup=0, pattern=pattern)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(6, 24, device=DEVICE)
    for each in (compiled, plain):
        torch.manual_seed(5)
        each(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
