"""`dropfx bench gpu`: refused without a GPU; a trial on the CPU goes through every row."""

import json
import os
from pathlib import Path

import pytest
import torch

from dropfx.cli import main


def test_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    assert main(["bench", "gpu"]) != 0
    assert "device" in capsys.readouterr().err


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on a GPU here")
def test_trial(tmp_path: Path) -> None:
    torch._dynamo.reset()
    options = ["--sizes", "32", "--rates", ".5", "--rounds", "1", "--dtype", "float32", "--out", str(tmp_path)]
    assert main(["bench", "gpu", "--device", "cpu", *options]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md", "gpu.png"]
    content = json.loads((tmp_path / "gpu.json").read_text())
    whats = [case["what"].partition(",")[0] for case in content["cases"]]
    assert whats == ["forward", "input gradient", "weight gradient", "both sides compact", "32-32-32-32"]
    assert all(set(case["ratios"]) == {"aten", "triton"} for case in content["cases"])
