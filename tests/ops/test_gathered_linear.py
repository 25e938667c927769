"""gathered_linear against the masked dense product and `linear`, whose result and gradients it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dropfx import ops
from dropfx.errors import DoubleBackwardError
from dropfx.ops import gathered_weight

N, K, ROWS = 24, 24, 6
KEPT = {  # starts and run
    "dense": (None, 0),
    "blocks": ([4, 12], 4),
    "wide": ([0, 8], 8),
    "ragged": ([5, 20], 5),  # the last block goes past the end
    "single units": ([1, 4, 13, 23], 1),
    "window": ([5], 9),
    "wraps": ([17], 9),
}


def starts_of(name: str) -> tuple[Tensor | None, int]:
    starts, run = KEPT[name]
    return None if starts is None else torch.tensor(starts), run


def operands(cols: tuple[Tensor | None, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    width = K if cols[0] is None else cols[0].numel() * cols[1]
    x = torch.randn(ROWS, width, dtype=dtype)
    return tuple(t.requires_grad_() for t in (x, torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype)))


def product(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Any, cols: Any, scale: float) -> Tensor:
    compact = ops.gathered_weight_op(weight.detach(), *rows, *cols)
    return ops.gathered_linear(x, weight, compact, bias, *rows, *cols, scale)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "stored transposed"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("cols", KEPT)
@pytest.mark.parametrize("rows", KEPT)
def test_is_linear(rows: str, cols: str, scale: float, transposed: bool) -> None:
    kept = starts_of(rows), starts_of(cols)
    x, weight, bias = operands(kept[1])
    if transposed:
        weight = weight.detach().t().contiguous().t().requires_grad_()
    expected = ops.linear_op(x, weight, bias, *kept[0], *kept[1], scale)
    found = product(x, weight, bias, *kept, scale)
    cotangent = torch.randn_like(found)
    leaves = (x, weight, bias)
    theirs = torch.autograd.grad(expected, leaves, cotangent)
    ours = torch.autograd.grad(found, leaves, cotangent)
    for got, want in zip((found, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(got, want)
    if rows == "blocks":
        dropped = torch.ones(N, dtype=torch.bool)
        dropped[4:8] = dropped[12:16] = False
        assert not ours[1][dropped].any()
        assert not ours[2][dropped].any()


@pytest.mark.parametrize("name", ["dense", "blocks", "single units"])
def test_gradcheck(name: str) -> None:
    """Of all but the weight's values that the kept weight was gathered from before."""
    rows, cols = starts_of("blocks"), starts_of(name)
    x, weight, bias = operands(cols)
    assert torch.autograd.gradcheck(lambda *t: product(t[0], weight, t[1], rows, cols, 2.0), (x, bias))


@pytest.mark.parametrize("again", [False, True])
def test_a_large_weight_is_gathered_again(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_weight, "_GATHER_AGAIN", 0 if again else ROWS + 1)
    cols = starts_of("wide")
    leaves = operands(cols)

    def gradients(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(product(x, weight, bias, (None, 0), cols, 2.0).square().sum(), (x, weight, bias))

    found = gradients(*leaves)
    expected = torch.autograd.grad(ops.linear_op(*leaves, None, 0, *cols, 2.0).square().sum(), leaves)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    targets = [node.target for node in make_fx(gradients)(*leaves).graph.nodes]
    assert targets.count(ops.gathered_weight_op) == 1 + again


def test_no_bias_leading_dimensions_and_frozen_operands() -> None:
    rows, cols = starts_of("blocks"), starts_of("wide")
    x, weight, _ = operands(cols)
    deep = x.detach().view(2, 3, -1)
    found = product(deep, weight, None, rows, cols, 1.0)
    assert found.shape == (2, 3, 8)
    (ours,) = torch.autograd.grad(found.sin().sum(), weight)
    expected = ops.linear_op(deep, weight, None, *rows, *cols, 1.0)
    torch.testing.assert_close(ours, *torch.autograd.grad(expected.sin().sum(), weight))


def test_a_compiler_sees_the_products() -> None:
    rows, cols = starts_of("blocks"), starts_of("wide")
    leaves = operands(cols)

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(product(x, weight, bias, rows, cols, 2.0).sum(), (x, weight, bias))

    graph = make_fx(step)(*leaves).graph
    targets = [str(node.target) for node in graph.nodes]
    assert [t for t in targets if "dropfx" in t] == ["dropfx.gathered_weight.default"]
    assert targets.count("aten.addmm.default") == 3


@pytest.mark.parametrize("cols", KEPT)
@pytest.mark.parametrize("rows", KEPT)
def test_what_is_kept_is_no_constant_of_a_compiled_graph(rows: str, cols: str) -> None:
    kept = starts_of(rows), starts_of(cols)
    leaves = operands(kept[1])
    draws = [starts for starts, _ in kept if starts is not None]

    def step(leaves: tuple[Tensor, Tensor, Tensor], draws: list[Tensor]) -> tuple[Tensor, ...]:
        drawn = iter(draws)
        own = [(None if starts is None else next(drawn), run) for starts, run in kept]
        made = product(*leaves, *own, 2.0)
        return made, *torch.autograd.grad(made.sin().sum(), leaves)

    graph = make_fx(step, tracing_mode="fake")(leaves, draws)
    others = [(starts + 1) % N for starts in draws]
    for got, want in zip(graph(leaves, others), step(leaves, others), strict=True):
        torch.testing.assert_close(got, want)


def test_second_derivative_is_refused() -> None:
    rows, cols = starts_of("blocks"), starts_of("wide")
    x, weight, bias = operands(cols)
    loss = product(x, weight, bias, rows, cols, 1.0).sin().sum()
    with pytest.raises(DoubleBackwardError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)
