"""What only a GPU can show: no synchronisation in a step, replay of a captured one, repeated runs, whole models."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dropfx
from tests.catalogue.case import mlp

pytestmark = pytest.mark.gpu

OPTIONS: list[dict[str, Any]] = [
    {"pattern": pattern, "lowering": lowering, "min_speedup": 0}
    for pattern in ("block", "slice")
    for lowering in ("aten", "triton", "auto")
]


def compiled(options: dict[str, Any]) -> tuple[nn.Module, torch.Tensor, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = dropfx.compile(mlp(256, 512, 512, 16).cuda(), **options)
    return model, torch.randn(128, 256, device="cuda"), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def step(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    out = model(x)
    F.mse_loss(out, torch.zeros_like(out)).backward()
    optimizer.step()
    return out


@pytest.mark.parametrize(
    "options", [*OPTIONS, {"pattern": "row", "min_speedup": 0}, {"groups": 4, "min_speedup": 0}], ids=str
)
def test_exact_given_the_draw(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dropfx.testing.assert_equivalent(
        mlp(256, 512, 512, 16).cuda(), torch.randn(128, 256, device="cuda"), options=options
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_does_not_wait_for_the_device(options: dict[str, Any]) -> None:
    model, x, optimizer = compiled(options)
    step(model, x, optimizer)  # traces
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, x, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_step_draws_anew_at_each_replay(options: dict[str, Any]) -> None:
    model, x, optimizer = compiled(options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, x, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, x, optimizer)
    kept = []
    for _ in range(4):
        graph.replay()
        kept.append(model[3].weight.grad.any(0))
    assert len({tuple(mask.tolist()) for mask in kept}) > 1, "every replay keeps the same units"


@pytest.mark.parametrize("pattern", ["block", "slice"])
def test_kernel_and_operations_draw_alike(pattern: str) -> None:
    """`lowering="aten"` draws by PyTorch's operations, the others by one launch."""
    masks = []
    for lowering in ("aten", "auto", "triton"):
        model, x, _ = compiled({"pattern": pattern, "lowering": lowering, "min_speedup": 0})
        torch.manual_seed(7)
        with dropfx.testing.record() as recorded:
            model(x)
        masks.append(recorded[0])
    for name, mask in masks[0].items():
        assert all(torch.equal(other[name], mask) for other in masks[1:])


def test_auto_measures_once_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPFX_CACHE_DIR", str(tmp_path))
    model, x = mlp(256, 512, 512, 16).cuda(), torch.randn(128, 256, device="cuda")
    found = [dropfx.explain(model, x, options={"min_speedup": 0}).lowerings for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]
    assert all("measured, forward and backward" in text for text in found[0].values())
    (file,) = tmp_path.iterdir()
    assert file.name.startswith(torch.cuda.get_device_name().replace(" ", "-"))


def test_kernels_launch_on_the_device_of_their_operands() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = mlp(256, 512, 16).to("cuda:1")
    x = torch.randn(128, 256, device="cuda:1")
    dropfx.testing.assert_equivalent(model, x, options={"lowering": "triton", "min_speedup": 0})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_repeated_runs_agree(options: dict[str, Any]) -> None:
    runs = []
    for _ in range(2):
        model, x, optimizer = compiled(options)
        for _ in range(5):
            step(model, x, optimizer)
        runs.append(copy.deepcopy(model.state_dict()))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


# -- recurrent layers -------------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Dropout before each recurrent layer and the decoder."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(60, 128), nn.Dropout(0.5)
        self.first, self.second = (kind(128, 128, **options) for _ in range(2))
        self.decode = nn.Linear(128, 60)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.embed(tokens))
        x = self.drop(self.first(x)[0])
        out: torch.Tensor = self.decode(self.drop(self.second(x)[0]))
        return out


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
def test_recurrent_layers_are_exact_given_the_draw(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, tokens = LanguageModel(kind, **options).cuda(), torch.randint(60, (12, 8), device="cuda")
    dropfx.testing.assert_equivalent(model, tokens, options={"min_speedup": 0})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
def test_weights_of_recurrent_layers_lie_as_cudnn_wants_them(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    """PyTorch warns of "RNN module weights" that it has to copy at every call; once a process, unless told."""
    torch.manual_seed(0)
    model = dropfx.compile(LanguageModel(kind, **options).cuda(), min_speedup=0)
    tokens = torch.randint(60, (12, 8), device="cuda")
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(tokens).sum().backward()
    finally:
        torch.set_warn_always(False)


def test_a_recurrent_layer_with_a_projection_is_exact_given_the_draw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Dropout(0.5)).cuda()
    layer = nn.LSTM(128, 128, proj_size=32).cuda()

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer = model, layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(self.before(x))[0]
            return out

    with warnings.catch_warnings():
        # where cuDNN keeps the projection is its own affair: PyTorch may have to copy the weights
        warnings.filterwarnings("ignore", message="RNN module weights")
        dropfx.testing.assert_equivalent(Projected(), torch.randn(12, 8, 64, device="cuda"), options={"min_speedup": 0})
