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
    sizes = "--sizes 32 --net 16-32-32-4 --batch 4 8 --classifier 40-32-32-4 --classifier-batch 4"
    options = [*sizes.split(), "--rates", ".5", "--rounds", "1", "--dtype", "float32", "--out", str(tmp_path)]
    assert main(["bench", "gpu", "--device", "cpu", *options]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md", "gpu.png"]
    content = json.loads((tmp_path / "gpu.json").read_text())
    cases = {case["what"]: case for case in content["cases"]}
    assert list(cases) == [
        "forward, 32",
        "input gradient, 32",
        "weight gradient, 32",
        "both sides compact, 32",
        "groups of 16 rows, 32, forward + backward",
        "32-32-32-32, batch 32, forward + backward",
        "16-32-32-4, batch 4, training step as a CUDA graph",
        "16-32-32-4, batch 8, training step as a CUDA graph",
        "40-32-32-4, batch 4, forward + backward",
    ]
    for what, case in cases.items():
        alone = what.endswith(", 32") or what.startswith("groups")
        assert set(case["ratios"]) == {"aten", "triton"} | (set() if alone else {"auto"})
        assert all(seconds > 0 for seconds in case["seconds"].values())
    peaks = cases["32-32-32-32, batch 32, forward + backward"]["peak_bytes"]
    assert peaks.keys() == {"eager", "torch.compile", "aten", "triton", "auto"}
    assert min(peaks.values()) > 3 * 32 * 32 * 4, "less than the gradients"
    assert {"gpu", "triton", "cuda", "dtype", "machine"} <= content.keys()
    assert "groups of 16 rows" in (tmp_path / "gpu.md").read_text()
