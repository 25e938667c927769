"""oneDNN's LSTM layer as an op: against nn.LSTM, whose arithmetic it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dropfx.errors import DoubleBackwardError
from dropfx.ops import EAGER, gather_op, lstm_layer_op
from dropfx.ops.recurrent import one_dnn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")

STEPS, BATCH, INPUTS, UNITS = 5, 3, 8, 16


def operands(reverse: bool) -> tuple[nn.LSTM, list[Tensor], Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.LSTM(INPUTS, UNITS, bidirectional=reverse)
    weights = [w for name, w in model.named_parameters() if name.endswith("_reverse") is reverse]
    x = torch.randn(STEPS, BATCH, INPUTS, requires_grad=True)
    h, c = (torch.randn(1 + reverse, BATCH, UNITS, requires_grad=True) for _ in range(2))
    return model, weights, x, h, c


KNOWN = one_dnn.kept_size(STEPS, BATCH, INPUTS, UNITS)


@pytest.mark.parametrize("size", [None, KNOWN, KNOWN + 100, 100, 0], ids=["varying", "known", "more", "less", "none"])
@pytest.mark.parametrize("reverse", [False, True])
def test_is_torchs(reverse: bool, size: int | None) -> None:
    model, weights, x, h, c = operands(reverse)
    out, (last_h, last_c) = model(x, (h, c))
    theirs = out[..., UNITS * reverse :], last_h[-1], last_c[-1]
    ours = lstm_layer_op(x, *weights, h[-1], c[-1], reverse, size)[:3]
    cotangents = [torch.randn_like(t) for t in theirs]
    leaves = [x, h, c, *weights]
    expected = torch.autograd.grad(theirs, leaves, cotangents)
    found = torch.autograd.grad(ours, leaves, cotangents)
    for got, want in zip((*ours, *found), (*theirs, *expected), strict=True):
        torch.testing.assert_close(got, want)


def test_on_kept_columns_of_the_inputs_weight() -> None:
    """Backward gathers them again, and the gradient is dense."""
    _, (_, *others), x, h, c = operands(False)
    starts, run = torch.tensor([0, 8]), 4
    wide = torch.randn(4 * UNITS, 3 * run, requires_grad=True)
    taken = EAGER[gather_op](wide, starts, run, 1)
    leaves = [x, h, c, wide, *others]
    cotangent = torch.randn(STEPS, BATCH, UNITS)
    expected, found = (
        lstm_layer_op(x, weight, *others, h[0], c[0], False, KNOWN, *cols)[0]
        for weight, cols in ((taken, ()), (wide, (starts, run)))
    )
    assert torch.equal(found, expected)
    of_found, of_expected = (torch.autograd.grad(out, leaves, cotangent) for out in (found, expected))
    for got, want in zip(of_found, of_expected, strict=True):
        assert torch.equal(got, want)


def test_not_all_results_used_nor_all_gradients_asked() -> None:
    model, weights, x, h, c = operands(False)
    frozen = [w.detach() for w in weights[:2]]
    out, *_ = lstm_layer_op(x, *frozen, *weights[2:], h[0], c[0], False, None)
    found = torch.autograd.grad(out.sum(), [x, weights[2]])
    expected = torch.autograd.grad(model(x, (h, c))[0].sum(), [x, weights[2]])
    torch.testing.assert_close(found, expected)


def test_second_derivative_is_a_named_error() -> None:
    _, weights, x, h, c = operands(False)
    out = lstm_layer_op(x, *weights, h[0], c[0], False, None)[0]
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(DoubleBackwardError, match="lstm_layer_backward"):
        slope.sum().backward()


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (5, 3, 8, 16), (7, 2, 1000, 10), (2, 600, 64, 256), (35, 20, 200, 650)]
)
def test_the_bound_of_varying_sizes_holds_and_is_not_far(sizes: tuple[int, int, int, int]) -> None:
    """Under the oneDNN of the tested PyTorch: else each backward would run a forward."""
    steps, batch, inputs, units = sizes
    bound = one_dnn._bound(torch.empty(steps, batch, inputs), torch.empty(4 * units, units))
    assert one_dnn.kept_size(*sizes) <= bound <= 4 * one_dnn.kept_size(*sizes) + 65536


@pytest.mark.parametrize("size", [None, KNOWN])
def test_opcheck(size: int | None) -> None:
    _, weights, x, h, c = operands(False)
    values = [t.detach() for t in (x, *weights, h[0], c[0])]
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(lstm_layer_op, (*values, False, size), test_utils=checks)
    values[1] = torch.randn(4 * UNITS, 12)
    torch.library.opcheck(lstm_layer_op, (*values, False, size, torch.tensor([0, 8]), 4), test_utils=checks)
