"""Kernels against plain indexing in float64, amid guard zones; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dropfx import kernels
from dropfx.kernels import Axis
from dropfx.kernels.tables import inverse, order
from tests.kernels.memory import guarded, guarded_outputs

pytestmark = [
    # the interpreter's exp of a large number, in a sigmoid that is 0 there
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
# units, run, kept runs, groups (0: a draw without groups)
AXES = {
    "dense": (50, 0, 0, 0),
    "single units": (50, 1, 23, 0),
    "short blocks": (48, 4, 7, 0),
    "long blocks": (128, 32, 3, 0),
    "blocks across tiles": (48, 12, 2, 0),
    "ragged blocks": (50, 8, 4, 0),
    "window": (50, 23, 1, 0),
    "groups": (48, 8, 3, 3),
    "groups of windows": (40, 11, 1, 3),
}
SHARED = [name for name, (*_, groups) in AXES.items() if not groups]


def axis(name: str) -> Axis:
    units, run, count, groups = AXES[name]
    return make_axis(units, run, count, groups)


def make_axis(units: int, run: int, count: int, groups: int = 0) -> Axis:
    if not run:
        return Axis(None, 0, units)
    if count == 1:
        starts = torch.randint(units, (max(groups, 1), 1))
        starts[0] = units - run // 2 - 1  # wraps
    else:
        last = -(-units // run)
        starts = torch.stack([torch.randperm(last)[:count].sort().values for _ in range(max(groups, 1))]) * run
        starts[0, -1] = (last - 1) * run  # at the end, where an axis may be ragged
    return Axis((starts if groups else starts[0]).to(DEVICE), run, units)


def kept(axis: Axis, group: int) -> Tensor:
    if axis.starts is None:
        return torch.arange(axis.units, device=DEVICE)
    starts = axis.starts[group] if axis.starts.dim() == 2 else axis.starts
    return (starts[:, None] + torch.arange(axis.run, device=DEVICE)).flatten() % axis.units


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return guarded(torch.randn(*shape).to(dtype=dtype, device=DEVICE))


def chunks(rows: int, groups: int) -> list[slice]:
    ends = [0, *torch.tensor([len(c) for c in torch.arange(rows).tensor_split(groups)]).cumsum(0).tolist()]
    return [slice(low, high) for low, high in pairwise(ends)]


def close(actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Rounded once to its type, from sums in float32 of terms whose absolute values sum to `magnitude`."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    allowed = torch.finfo(actual.dtype).eps * expected.abs() + 1e-6 * magnitude + 1e-7
    assert (error <= allowed).all(), f"{error.max():.3g} off, {(error / allowed).max():.2f} times what is allowed"


def check_products(outs: Axis, sums: Axis, rows: int, dtype: torch.dtype, patch: Any, activation: str = "none") -> None:
    """Forward and all gradients of y = act(2 * x @ W[outs, sums]^T + b[outs])."""
    x, w = randn(rows, sums.width, dtype=dtype), randn(outs.units, sums.units, dtype=dtype)
    bias, dy = randn(outs.units, dtype=dtype), randn(rows, outs.width, dtype=dtype)
    groups = max(outs.groups, sums.groups)
    with guarded_outputs(patch):
        y = kernels.gathered_matmul(x, w, outs, sums, bias=bias, scale=2.0, activation=activation, leading=rows)
        dx = kernels.gathered_matmul(dy, w.t(), sums, outs, scale=2.0, leading=rows)
    dw, db = (torch.zeros(s, dtype=torch.float64, device=DEVICE) for s in (w.shape, bias.shape))
    size = torch.zeros_like(dw)
    for group, here in enumerate(chunks(rows, groups)):
        n, k = kept(outs, group), kept(sums, group)
        weight = w.double()[n][:, k]
        raw = 2 * x[here].double() @ weight.T + bias.double()[n]
        scale_of = 2 * x[here].double().abs() @ weight.abs().T + bias.double()[n].abs()
        close(y[here], ACTIVATIONS[activation](raw), scale_of)
        close(dx[here], 2 * dy[here].double() @ weight, 2 * dy[here].double().abs() @ weight.abs())
        dw.index_put_((n[:, None], k), 2 * dy[here].double().T @ x[here].double(), accumulate=True)
        size.index_put_((n[:, None], k), 2 * dy[here].double().abs().T @ x[here].double().abs(), accumulate=True)
        db.index_add_(0, n, dy[here].double().sum(0))
    if outs.ragged or sums.ragged:
        return
    with guarded_outputs(patch):
        made = kernels.weight_gradient(dy, x, outs, sums, 2.0, leading=rows)
        made_bias = kernels.bias_gradient(dy, outs, leading=rows)
    close(made, dw, size)
    assert not made[size == 0].any(), "a dropped place has a gradient"
    close(made_bias, db, dy.double().abs().sum() + 0 * db)


@pytest.mark.parametrize("name", [name for name in AXES if name not in ("dense", "ragged blocks")])
def test_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what kernels rely on: within aligned chunks, units and positions count on alike."""
    torch.manual_seed(0)
    here = axis(name)
    with guarded_outputs(monkeypatch):
        found = inverse(here)
    for group in range(here.groups):
        units = kept(here, group)
        expected = torch.full((here.units,), -1, dtype=torch.int32, device=DEVICE)
        expected[units] = torch.arange(here.width, dtype=torch.int32, device=DEVICE)
        assert torch.equal(found[group], expected)
        for run_on in (units, expected[expected >= 0]):
            chunks = run_on.view(-1, here.chunk)
            assert (chunks[:, 0] % here.chunk == 0).all()
            assert torch.equal(chunks - chunks[:, :1], torch.arange(here.chunk, device=DEVICE).expand_as(chunks))
    assert here.width % here.alignment == 0
    if here.groups == 1:
        with guarded_outputs(monkeypatch):
            ordered = order(here)
        dropped = (found[0] < 0).nonzero().flatten()
        assert torch.equal(ordered.long(), torch.cat([kept(here, 0), dropped]))


@pytest.mark.parametrize(
    ("units", "run", "count", "chunk", "alignment"),
    [
        (64, 0, 0, 16, 16),
        (50, 0, 0, 2, 2),
        (128, 64, 1, 1, 16),
        (128, 64, 2, 16, 16),
        (96, 24, 2, 8, 8),
        (50, 8, 3, 2, 8),
    ],
)
def test_chunks(units: int, run: int, count: int, chunk: int, alignment: int) -> None:
    here = Axis(torch.arange(count) * run if run else None, run, units)
    assert (here.chunk, here.alignment) == (chunk, alignment)


def far_apart(rows: int, units: int) -> Tensor:
    """Rows 2^30 items from one another: pages of memory that nobody touches are never there."""
    return torch.empty(rows * 2**30, dtype=torch.bfloat16, device=DEVICE).as_strided((rows, units), (2**30, 1))


def test_offsets_beyond_2_to_the_31() -> None:
    """Of operands; int32 would wrap at the third row."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    torch.manual_seed(0)
    sums = axis("short blocks")
    x, w = far_apart(5, sums.width), far_apart(5, sums.units)
    for operand in (x, w):
        operand.copy_(torch.randn(operand.shape))
    near, dense = (x.contiguous(), w.contiguous()), Axis(None, 0, 5)
    assert torch.equal(kernels.gathered_matmul(x, w, dense, sums), kernels.gathered_matmul(*near, dense, sums))
    dy = far_apart(5, 5)
    dy.copy_(torch.randn(5, 5))
    found = kernels.weight_gradient(dy, x, dense, sums)
    assert torch.equal(found, kernels.weight_gradient(dy.contiguous(), near[0], dense, sums))
    assert torch.equal(kernels.bias_gradient(dy, dense), kernels.bias_gradient(dy.contiguous(), dense))
    tile = (4, 4), 2, 1
    assert torch.equal(
        kernels.tiled_matmul(x, w[:, : sums.width], *tile),
        kernels.tiled_matmul(near[0], near[1][:, : sums.width], *tile),
    )
    assert torch.equal(
        kernels.tiled_weight_gradient(dy, x, *tile), kernels.tiled_weight_gradient(dy.contiguous(), near[0], *tile)
    )


@pytest.mark.parametrize("sums", SHARED)
@pytest.mark.parametrize("outs", SHARED)
def test_products(outs: str, sums: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    check_products(axis(outs), axis(sums), 19, torch.float32, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", SHARED)
def test_products_in_half_precision(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    check_products(axis(name), axis(name), 19, dtype, monkeypatch)


@pytest.mark.parametrize(
    ("outs", "sums"), [("groups", "dense"), ("dense", "groups"), ("groups", "groups of windows"), ("window", "groups")]
)
@pytest.mark.parametrize("rows", [2, 3, 19])
def test_products_in_groups(outs: str, sums: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    check_products(axis(outs), axis(sums), rows, torch.float32, monkeypatch)


def test_groups_of_several_rows_a_leading_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """x [5, 7, K]: the groups cut the 5."""
    torch.manual_seed(0)
    sums = axis("groups")
    x, w = randn(5, 7, sums.width, dtype=torch.float32), randn(20, sums.units, dtype=torch.float32)
    y = kernels.gathered_matmul(x.view(35, -1), w, Axis(None, 0, 20), sums, leading=5).view(5, 7, 20)
    for group, here in enumerate(chunks(5, 3)):
        torch.testing.assert_close(y[here], x[here] @ w[:, kept(sums, group)].T)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(ACTIVATIONS) == set(kernels.ACTIVATIONS)
    torch.manual_seed(0)
    check_products(axis("dense"), axis("short blocks"), 9, torch.float32, monkeypatch, activation)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    sides = []
    groups = data.draw(st.sampled_from([0, 0, 2, 3]))
    for _ in range(2):
        units, run = data.draw(st.integers(2, 70)), data.draw(st.sampled_from([0, 1, 2, 3, 8, 16, 24]))
        blocks = -(-units // max(run, 1))
        whole = run and units >= 2 * run and units % run == 0
        sides.append((units, run, data.draw(st.integers(1, blocks - 1)), groups) if whole else (units, 0, 0))
    rows, dtype = data.draw(st.integers(max(groups, 1), 40)), data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    with pytest.MonkeyPatch.context() as patch:
        check_products(*(make_axis(*side) for side in sides), rows, dtype, patch)


def test_any_strides() -> None:
    torch.manual_seed(0)
    outs, sums = axis("short blocks"), axis("single units")
    x, w = (
        torch.randn(2, 19 * sums.width, device=DEVICE)[:, ::1],
        torch.randn(sums.units, outs.units, device=DEVICE).t(),
    )
    x = x[0].view(sums.width, 19).t()
    dy = torch.ones(1, 1, device=DEVICE).expand(19, outs.width)
    n, k = kept(outs, 0), kept(sums, 0)
    torch.testing.assert_close(kernels.gathered_matmul(x, w, outs, sums), x @ w[n][:, k].T)
    torch.testing.assert_close(kernels.gathered_matmul(dy, w.t(), sums, outs), dy @ w[n][:, k])
    made = kernels.weight_gradient(dy, x, outs, sums)
    torch.testing.assert_close(made[n][:, k], dy.T @ x)


def test_tanh_keeps_its_digits_near_zero() -> None:
    """Relative to its value, as PyTorch's."""
    x = torch.cat([torch.logspace(-30, 1, 200), torch.linspace(0.19, 0.21, 50)]).to(DEVICE)[:, None]
    one = torch.ones(1, 1, device=DEVICE)
    y = kernels.gathered_matmul(x, one, Axis(None, 0, 1), Axis(None, 0, 1), activation="tanh")
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=1e-6, atol=0)


def test_gelu_keeps_its_digits_far_below_zero() -> None:
    """Relative to its value, which PyTorch's own loses there: 1 + erf(x) is a difference."""
    x = torch.cat([torch.linspace(-6, 6, 300), torch.logspace(-30, 1, 200)]).to(DEVICE)[:, None]
    one = torch.ones(1, 1, device=DEVICE)
    y = kernels.gathered_matmul(x, one, Axis(None, 0, 1), Axis(None, 0, 1), activation="gelu")
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    torch.testing.assert_close(y.double(), exact, rtol=5e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 8), (5, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    x, dense = torch.randn(*shape, device=DEVICE), Axis(None, 0, shape[1])
    w = torch.randn(3, shape[1], device=DEVICE)
    assert torch.equal(kernels.gathered_matmul(x, w, Axis(None, 0, 3), dense), x @ w.T)
    assert torch.equal(kernels.weight_gradient(x @ w.T, x, Axis(None, 0, 3), dense), torch.zeros_like(w))


@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize("tile", [(32, 32), (16, 8), (5, 7), (1, 1), (64, 3)])
@pytest.mark.parametrize(("period", "offset"), [(1, 0), (2, 1), (5, 2)])
def test_tiles(
    tile: tuple[int, int], period: int, offset: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    n, k, rows = 70, 83, 18
    x, w, bias = randn(rows, k, dtype=dtype), randn(n, k, dtype=dtype), randn(n, dtype=dtype)
    dy = randn(rows, n, dtype=dtype)
    place = (torch.arange(n) // tile[0])[:, None] + torch.arange(k) // tile[1]
    mask = ((place - offset) % period == 0).double().to(DEVICE)
    masked, scale = w.double() * mask, 1.5
    with guarded_outputs(monkeypatch):
        y = kernels.tiled_matmul(x, w, tile, period, offset, bias=bias, scale=scale)
        dx = kernels.tiled_matmul(dy, w.t(), tile[::-1], period, offset, scale=scale)
        dw = kernels.tiled_weight_gradient(dy, x, tile, period, offset, scale)
    a, b = x.double(), dy.double()
    close(y, scale * a @ masked.T + bias.double(), scale * a.abs() @ masked.abs().T + bias.double().abs())
    close(dx, scale * b @ masked, scale * b.abs() @ masked.abs())
    close(dw, scale * (b.T @ a) * mask, scale * b.abs().T @ a.abs())
    assert not dw[mask == 0].any()


@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize("name", [name for name in AXES if name != "dense"])
@pytest.mark.parametrize("inner", [(), (3,)])
def test_gather_and_scatter(
    name: str, inner: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    units = axis(name)
    shape = (5, 2)
    x, base = (randn(*shape, units.units, *inner, dtype=dtype) for _ in range(2))
    y = randn(*shape, units.width, *inner, dtype=dtype)
    with guarded_outputs(monkeypatch):
        taken = kernels.gather_units(x, 2, units, leading=5)
    scatter, added = torch.zeros_like(x), base.double()
    for group, here in enumerate(chunks(5, units.groups)):
        where = kept(units, group)
        assert torch.equal(taken[here], x[here].index_select(2, where))
        if not units.ragged:
            scatter[here] = scatter[here].index_copy(2, where, y[here])
            added[here] = added[here].index_add(2, where, 0.5 * y[here].double())
    if units.ragged:
        return
    with guarded_outputs(monkeypatch):
        assert torch.equal(kernels.scatter_units(y, 2, units, leading=5), scatter)
        close(kernels.scatter_units(y, 2, units, leading=5, base=base, alpha=0.5), added, added.abs())
