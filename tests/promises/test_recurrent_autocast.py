"""Recurrent layers under autocast on a CPU: what they return has the dtypes of torch.nn's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree

from tests.promises.both_ways import compiled_both_ways

LAYERS: dict[str, Any] = {
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "lstm_projected": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=32, **options),
    "lstm": nn.LSTM,
}
CELLS = (nn.GRUCell, nn.LSTMCell, nn.RNNCell)


class Net(nn.Module):
    """Dropout > recurrent layers with a dropout between > Linear, of padded or of packed rows."""

    def __init__(self, kind: Any, packed: bool, **options: Any) -> None:
        super().__init__()
        self.drop, self.layers, self.packed = nn.Dropout(0.5), kind(64, 64, 2, dropout=0.5, **options), packed

    def forward(self, x: Tensor) -> Any:
        x = self.drop(x)
        rows = pack_padded_sequence(x, torch.tensor([5, 5, 3, 2])) if self.packed else x
        out, state = self.layers(rows)
        return out.data if isinstance(out, PackedSequence) else out, state


class Step(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.drop, self.cell = nn.Dropout(0.5), kind(64, 64)

    def forward(self, x: Tensor) -> Any:
        return self.cell(self.drop(x[0]))


def dtypes(results: Any) -> list[torch.dtype]:
    return [leaf.dtype for leaf in pytree.tree_leaves(results)]


def check(model: nn.Module, dtype: torch.dtype, x: Tensor, ways: int = 2) -> None:
    """The same dtypes as torch.nn's; finite gradients in the parameters' own."""
    for compiled in itertools.islice(compiled_both_ways(model, inner="aot_eager"), ways):
        with torch.autocast("cpu", dtype):
            expected, results = dtypes(model(x)), compiled(x)
        assert dtypes(results) == expected
        sum(leaf.float().sum() for leaf in pytree.tree_leaves(results)).backward()
        assert all(p.grad is not None and p.grad.dtype is p.dtype for p in compiled.parameters())
        assert all(bool(p.grad.isfinite().all()) for p in compiled.parameters() if p.grad is not None)


@pytest.mark.parametrize("given", [torch.float32, None], ids=["whole", "low"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "lstm"])
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_layers(name: str, dtype: torch.dtype, given: torch.dtype | None) -> None:
    check(Net(LAYERS[name], packed=False), dtype, torch.randn(5, 4, 64, dtype=given or dtype))


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"bias": False}], ids=str)
def test_gru_of_other_forms(options: dict[str, bool]) -> None:
    check(Net(nn.GRU, packed=False, **options), torch.bfloat16, torch.randn(5, 4, 64))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_packed_layers(name: str) -> None:
    check(Net(LAYERS[name], packed=True), torch.bfloat16, torch.randn(5, 4, 64), ways=1)  # Dynamo leaves packing out


@pytest.mark.filterwarnings("ignore:TF32")
def test_lstm_without_one_dnn() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        check(Net(nn.LSTM, packed=False), torch.bfloat16, torch.randn(5, 4, 64))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cells(kind: type[nn.Module], dtype: torch.dtype) -> None:
    check(Step(kind), dtype, torch.randn(5, 4, 64))
