"""What is measured is kept, by device and versions, and decides; with a clock of the tests and Triton's interpreter."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dropfx
from dropfx.kernels import configs
from dropfx.kernels.configs import Config
from dropfx.passes import PIPELINE  # noqa: F401  # registers the ops
from dropfx.planning import lowering
from dropfx.planning.autotune import Tuner
from tests.catalogue.case import mlp

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def untouched_tables() -> Iterator[None]:
    before = dict(configs.chosen)
    configs.chosen.clear()
    yield
    configs.chosen.clear()
    configs.chosen.update(before)


class Clock:
    """A timer that runs the step and takes its seconds from a table by what the step calls; counts its calls."""

    def __init__(self, **seconds: float) -> None:
        self.table, self.calls = seconds, 0

    def __call__(self, step: Any) -> float:
        self.calls += 1
        step()
        return self.table.get(getattr(step, "name", ""), 1.0)


def step(name: str) -> Any:
    def run() -> None: ...

    run.name = name  # type: ignore[attr-defined]
    return run


STEPS = {"aten": step("aten"), "triton": step("triton")}


def test_measures_once_and_keeps(tmp_path: Path) -> None:
    path, clock = tmp_path / "new" / "gpu.json", Clock(aten=2.0, triton=1.0)
    tuner = Tuner(path, clock)
    assert tuner.measure("linear", STEPS) == {"aten": 2.0, "triton": 1.0}
    calls = clock.calls
    tuner.measure("linear", STEPS)
    assert clock.calls == calls
    assert Tuner(path, Clock(aten=9.0)).measure("linear", STEPS) == {"aten": 2.0, "triton": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\0\0",
        '{"seconds": 3, "tiles": []}',
        '{"seconds": {"linear": 3}, "tiles": {"matmul": "large"}}',
        '{"seconds": {"linear": {"aten": -1.0, "triton": 1.0}}, "tiles": {"matmul": [1, 2, 3, 4, 5]}}',
        '{"seconds": {"linear": {"aten": 1.0}}, "tiles": {"matmul": [128, 128]}}',
    ],
)
def test_a_file_that_makes_no_sense_is_measured_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(content)
    assert Tuner(path, Clock(aten=2.0)).measure("linear", STEPS) == {"aten": 2.0, "triton": 1.0}
    assert not configs.chosen
    assert json.loads(path.read_text())["seconds"] == {"linear": {"aten": 2.0, "triton": 1.0}}


def test_a_file_of_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert Tuner(path, Clock()).measure("linear", STEPS)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """The process keeps what it measured."""
    (tmp_path / "file").write_text("")
    tuner = Tuner(tmp_path / "file" / "gpu.json", Clock(aten=2.0))
    assert tuner.measure("linear", STEPS) == tuner.measure("linear", STEPS)


def write(path: Path, number: int) -> None:
    for each in range(20):
        Tuner(path, Clock()).measure(f"linear {number} {each}", STEPS)


def test_several_writers_leave_a_whole_file(tmp_path: Path) -> None:
    """The last one wins where two write at once; what is there is never half a file."""
    path = tmp_path / "gpu.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(path, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not path.exists() or json.loads(path.read_text())
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert {f"linear {number} 19" for number in range(3)} & json.loads(path.read_text())["seconds"].keys()
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]


# -- tiles ----------------------------------------------------------------------------------------------------------

SMALL, LARGE = Config(64, 64, 64, 4, 3), Config(128, 128, 64, 8, 3)


def test_candidates_are_pruned_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "INTERPRETED", False)
    monkeypatch.setattr(configs, "_capability", lambda: 8)
    assert len(configs.candidates(8192, 8192, torch.bfloat16)) == 4
    monkeypatch.setattr(configs, "_capability", lambda: 9)
    large = configs.candidates(8192, 8192, torch.bfloat16)
    assert large[0] == LARGE
    assert SMALL in large
    assert len(large) == len(set(large)) == 6
    assert configs.candidates(8192, 8192, torch.bfloat16, small="only") == (SMALL,)
    first, *others = configs.candidates(8192, 8192, torch.bfloat16, small="first")
    assert first == SMALL
    assert {first, *others} == set(large)
    assert all(tile.m <= 64 for tile in configs.candidates(33, 8192, torch.bfloat16))
    assert all(
        configs.known(tile) for size in (torch.float32, torch.float16) for tile in configs.candidates(99, 99, size)
    )


def test_the_fastest_tile_of_each_product_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two products, whose times depend on their tiles."""
    monkeypatch.setattr(configs, "INTERPRETED", False)
    monkeypatch.setattr(configs, "_capability", lambda: 9)
    seen: dict[int, Config] = {}

    def run() -> None:
        for m in (8192, 64):
            seen[m] = configs.config_for("matmul", m, 8192, 8192, torch.bfloat16)

    def timed(step: Any) -> float:
        step()
        if seen[64].n == 128:
            raise RuntimeError("out of shared memory")
        return abs(seen[8192].m * seen[8192].n - 128 * 256) + abs(seen[64].n - 128) + 1.0

    tuner = Tuner(tmp_path / "gpu.json", timed)
    tuner._tune(run)
    run()
    assert seen == {8192: Config(128, 256, 64, 8, 3), 64: SMALL}
    tuner._keep()
    configs.chosen.clear()
    Tuner(tmp_path / "gpu.json", timed)
    assert configs.config_for("matmul", 8000, 8192, 8192, torch.bfloat16).n == 256, "shapes are of one power of two"
    assert configs.config_for("matmul", 4000, 8192, 8192, torch.bfloat16) == LARGE


# -- the choice of a lowering -----------------------------------------------------------------------------------------


class Timed:
    """A clock by which one lowering is faster, as seen by the kernels that a step launches."""

    def __init__(self, faster: str) -> None:
        self.faster, self.steps = faster, 0

    def __call__(self, step: Any) -> float:
        self.steps += 1
        with configs.listening() as asked:
            step()
        return 1.0 if ("triton" if asked else "aten") == self.faster else 2.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU with Triton's interpreter counts as a device whose kernels may be chosen."""
    for module in ("dropfx.planning.lowering", "dropfx.passes.lower"):
        monkeypatch.setattr(__import__("sys").modules[module], "why_no_kernels", lambda device: "")


def explained(model: nn.Module, x: torch.Tensor, **options: Any) -> dict[str, str]:
    return dropfx.explain(model, x, options={"min_speedup": 0, **options}).lowerings


MODEL, X = mlp(24, 40, 64, 8), torch.randn(6, 24)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("faster", ["aten", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"pattern": "slice"}, {"groups": 2}, {"pattern": "tile"}, {"block": 7}], ids=str
)
def test_the_faster_is_taken(
    faster: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Timed(faster)
    tuner = Tuner(tmp_path / "cpu.json", clock)
    monkeypatch.setattr("dropfx.planning.autotune.tuner_for", lambda device: tuner)
    state = torch.get_rng_state()
    found = explained(MODEL, X, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert found
    for label, text in found.items():
        assert "measured, forward and backward: aten" in text, (label, text)
        assert text.startswith(f"{faster}, "), (label, text)
    assert {"2", "5"} <= set(" ".join(found).split()), "names of the sites"
    model = mlp(24, 40, 64, 8)
    dropfx.testing.assert_equivalent(model, X, options={"min_speedup": 0, **options})
    steps = clock.steps
    explained(MODEL, X, **options)
    assert clock.steps == steps, "measured twice"


@pytest.mark.usefixtures("gpu")
def test_the_faster_is_taken_under_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner(tmp_path / "cpu.json", Timed("triton"))
    monkeypatch.setattr("dropfx.planning.autotune.tuner_for", lambda device: tuner)
    torch._dynamo.reset()
    compiled = torch.compile(mlp(24, 40, 64, 8), backend="dropfx", options={"min_speedup": 0, "inner": "aot_eager"})
    compiled(X).sum().backward()
    assert any(key.startswith("dropfx.linear") for key in tuner.seconds)
    assert all(times["triton"] < times["aten"] for times in tuner.seconds.values())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("full"), "no memory for a trial"),
        (RuntimeError("no image of a kernel\nand more"), "a trial fails: no image of a kernel"),
    ],
)
def test_without_a_measurement_the_cost_table_decides(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> Any:
        raise error

    monkeypatch.setattr("dropfx.planning.autotune.tuner_for", fail)
    for faster, times in (("aten", {"aten": 1.0, "triton": 2.0}), ("triton", {"aten": 2.0, "triton": 1.0})):
        monkeypatch.setattr(lowering, "lowered_times", lambda *a, times=times: times)
        found = explained(MODEL, X)
        linears = {label: text for label, text in found.items() if label.startswith("linear")}
        assert len(linears) == 3
        assert set(linears.values()) == {f"{faster}, by the device's cost table; not measured: {reason}"}


@pytest.mark.usefixtures("gpu")
def test_a_width_that_varies_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dropfx.planning.autotune.tuner_for", None)
    assert all("varies" in text for text in explained(MODEL, X, pattern="row").values())


def test_a_forced_lowering_says_so() -> None:
    assert set(explained(MODEL, X, lowering="triton").values()) == {"triton, asked for"}
    assert "linear" in str(dropfx.explain(MODEL, X, options={"min_speedup": 0, "lowering": "triton"}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_cpu_has_no_choice() -> None:
    assert explained(MODEL, X) == {}
