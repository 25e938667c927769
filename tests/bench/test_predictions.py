"""`dropfx bench predictions`: its cases, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dropfx.bench import predictions
from dropfx.bench.predictions import ALL, DEFAULT, EAGER, Case, Result, summary_table
from dropfx.cli import main


@pytest.mark.parametrize("model", predictions.MODELS)
def test_a_small_run(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--widths", "16", "--batch", "32", "--rates", ".5", "--rounds", "1"]
    command = ["bench", "predictions", "--models", model, *sizes, "--malloc", "system", "--out", str(tmp_path)]
    assert main(command) == 0
    (case,) = json.loads((tmp_path / "predictions.json").read_text())["cases"]
    assert case["rewritten"] == 0 < case["sites"]
    assert case["predicted"] > 0
    assert {*case["seconds"]} == {EAGER, DEFAULT, ALL}
    assert "worst default" in capsys.readouterr().out
    assert "16" in (tmp_path / "predictions.md").read_text()


def test_the_summary() -> None:
    results = [
        Result(Case("mlp", 64, 16, 0.5), {}, default=0.9, everything=0.5, predicted=0.6, rewritten=1, sites=2),
        Result(Case("mlp", 64, 128, 0.5), {}, default=1.2, everything=1.2, predicted=1.2, rewritten=2, sites=2),
        Result(Case("mlp", 64, 512, 0.5), {}, default=1.4, everything=1.5, predicted=1.2, rewritten=2, sites=2),
    ]
    (row,) = zip(*(column.cells for column in summary_table(results).columns), strict=True)
    assert row == ("mlp", "0.90x", "1 of 3", "20%", "20%")
