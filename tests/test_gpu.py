"""What only a GPU can show: no synchronisation in a step, replay of a captured one, repeated runs, whole models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dropfx
from tests.case import mlp

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
