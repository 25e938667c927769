"""Products by oneDNN: the same values, and only where autograd, autocast and modes need not see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dropfx.ops import products
from dropfx.ops.products import scaled_bmm, scaled_linear, scaled_mm


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST_WORK", 1)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by each product that is oneDNN's."""
    calls: list[Any] = []
    by_one_dnn = products._by_one_dnn
    monkeypatch.setattr(products, "_by_one_dnn", lambda *args: (calls.append(args), by_one_dnn(*args))[1])
    return calls


def operands(transposed: bool = False) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    a, b = torch.randn(7, 12), torch.randn(12, 9)
    return a, b.t().contiguous().t() if transposed else b


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("wide", [False, True])
def test_product(wide: bool, scale: float, transposed: bool, called: list[Any]) -> None:
    a, b = operands(transposed)
    b = torch.cat([b, b], 1) if wide else b
    before = a.clone()
    torch.testing.assert_close(scaled_mm(a, b, scale), scale * (a @ b))
    assert len(called) == 1
    assert torch.equal(a, before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_linear(scale: float, bias: bool, called: list[Any]) -> None:
    (x, w), b = operands(), torch.randn(9) if bias else None
    weight = w.t().contiguous()
    got = scaled_linear(x.view(1, 7, 12), weight, b, scale)
    torch.testing.assert_close(got, (scale * (x @ w) + (0 if b is None else b))[None])
    assert len(called) == 1


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("added", [False, True])
def test_products_of_groups(scale: float, added: bool) -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 4, 5), torch.randn(3, 5, 6), torch.randn(3, 1, 6)
    want = scale * (a @ b) + (c if added else 0)
    torch.testing.assert_close(scaled_bmm(a, b, scale, c if added else None), want)


def test_strided_operands_are_left_to_blas(called: list[Any]) -> None:
    a, b = operands()
    wide = torch.randn(7, 24)[:, ::2]
    torch.testing.assert_close(scaled_mm(wide, b, 1.0), wide.contiguous() @ b)
    torch.testing.assert_close(scaled_mm(a, torch.randn(24, 9)[::2], 0.0), torch.zeros(7, 9))
    assert not called


def test_other_dtypes_are_left_to_blas(called: list[Any]) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        scaled_mm(*(operand.to(dtype) for operand in operands()), 1.0)
    assert not called


def test_derivatives_stay_possible(called: list[Any]) -> None:
    a, b = operands()
    (made,) = torch.autograd.grad(scaled_mm(a.requires_grad_(), b, 2.0).sum(), a)
    torch.testing.assert_close(made, 2.0 * b.sum(1).expand_as(a))
    assert not called


def test_autocast_sees_the_product(called: list[Any]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scaled_mm(*operands(), 1.0).dtype is torch.bfloat16
    assert not called


def test_modes_see_the_product(called: list[Any]) -> None:
    with FlopCounterMode(display=False) as counter:
        scaled_mm(*operands(), 1.0)
    assert counter.get_total_flops() == 2 * 7 * 12 * 9
    assert not called


def test_users_may_switch_one_dnn_off(called: list[Any]) -> None:
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of settings that it does not have
    try:
        scaled_mm(*operands(), 1.0)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert not called


def test_small_products_are_left_to_blas(called: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST_WORK", 7 * 12 * 9 + 1)
    scaled_mm(*operands(), 1.0)
    assert not called
