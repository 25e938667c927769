"""Promise 6 beyond one process: saved models load elsewhere, and wrappers of distributed training work."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dropfx
from dropfx.draws.runtime import numbers_of_their_own
from tests.catalogue import CASES
from tests.catalogue.case import check_step, pair, recording

ROOT = pathlib.Path(__file__).resolve().parents[2]

LOAD = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
x, want = torch.load(sys.argv[2])
torch.manual_seed(0)
assert torch.equal(model(x), want)
import dropfx
with dropfx.testing.record() as masks:
    model(x)
assert set(masks[0]) == {"drop1", "drop2"}, masks
dropfx.restore(model)
assert type(model).__name__ == "SharedLinear" and "dropfx" not in type(model).__module__
"""


def run_python(code: str, *args: object) -> None:
    command = [sys.executable, "-c", code, *map(str, args)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("traced", [False, True])
def test_saved_model_loads_in_a_new_process(tmp_path: pathlib.Path, traced: bool) -> None:
    """Without the library imported there first; the draws are the same."""
    model = dropfx.compile(CASES["shared_linear"].make(), min_speedup=0)
    x = torch.randn(4, 64)
    if traced:
        model(x)
    torch.save(model, tmp_path / "model.pt")
    torch.manual_seed(0)
    torch.save((x, model(x).detach()), tmp_path / "example.pt")
    run_python(LOAD, tmp_path / "model.pt", tmp_path / "example.pt")


def test_state_dict_is_plain(tmp_path: pathlib.Path) -> None:
    model = dropfx.compile(CASES["mlp"].make(), min_speedup=0)
    model(torch.randn(4, 64))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    CASES["mlp"].make().load_state_dict(state, strict=True)


@pytest.fixture
def process_group(tmp_path: pathlib.Path) -> object:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("no gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("static", [False, True])
def test_data_parallel_after_compile(static: bool) -> None:
    original, compiled = pair(CASES["mlp"], torch.float64)
    parallel = DistributedDataParallel(compiled, static_graph=static)
    x = CASES["mlp"].call(4, torch.float64)[0][0]
    for _ in range(3):
        check_wrapped(original, compiled, parallel, x)


@pytest.mark.usefixtures("process_group")
def test_data_parallel_before_compile() -> None:
    """The wrapped module is compiled, not the wrapper."""
    original, model = CASES["mlp"].make(torch.float64), CASES["mlp"].make(torch.float64)
    parallel = DistributedDataParallel(model)
    dropfx.compile(parallel.module, min_speedup=0)
    for _ in range(2):
        check_wrapped(original, model, parallel, CASES["mlp"].call(4, torch.float64)[0][0])


def check_wrapped(original: nn.Module, compiled: nn.Module, parallel: nn.Module, x: torch.Tensor) -> None:
    """The same draw through the wrapper gives the same gradients as without it."""
    assert set(check_step(original, compiled, (x,), dtype=torch.float64, seed=1)) == {"2", "5"}
    want = {name: parameter.grad.clone() for name, parameter in compiled.named_parameters()}
    compiled.zero_grad()
    torch.manual_seed(1)
    with recording() as masks, numbers_of_their_own():
        y = parallel(x)
    assert set(masks) == {"2", "5"}
    generator = torch.Generator().manual_seed(0)
    (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum().backward()
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("process_group")
def test_wrapper_itself_is_refused() -> None:
    parallel = DistributedDataParallel(CASES["mlp"].make())
    with pytest.raises(dropfx.DropfxError, match="DistributedDataParallel"):
        dropfx.compile(parallel)
    assert type(parallel) is DistributedDataParallel
