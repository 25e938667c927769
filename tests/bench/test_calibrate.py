"""`dropfx calibrate`: costs are measured, kept, and planned by; files that make no sense count for nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import dropfx
from dropfx.bench import calibrate
from dropfx.cli import main
from dropfx.graph import device_costs
from dropfx.graph.device_costs import DEVICES, costs_file, costs_of, keep
from tests.catalogue.case import mlp

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DROPFX_CACHE_DIR", str(tmp_path))
    device_costs._read.cache_clear()
    return tmp_path


def test_without_a_file_the_table_holds() -> None:
    assert costs_of(CPU) is DEVICES["cpu"]


def test_what_is_kept_is_planned_by() -> None:
    model, x = mlp(64, 256, 256, 8), torch.randn(1024, 64)
    assert any(site.rewritten for site in dropfx.explain(model, x).sites)
    slow = dataclasses.replace(DEVICES["cpu"], gathered=1.0)
    keep(CPU, slow)
    assert costs_of(CPU) == slow
    assert not any(site.rewritten for site in dropfx.explain(model, x).sites)


@pytest.mark.parametrize(
    "content",
    ["", "no JSON", "[]", "{}", json.dumps({**dataclasses.asdict(DEVICES["cpu"]), "launch": -1.0})],
    ids=["empty", "text", "a list", "no costs", "a negative time"],
)
def test_a_file_that_makes_no_sense_counts_for_nothing(content: str) -> None:
    costs_file(CPU).write_text(content)
    assert costs_of(CPU) is DEVICES["cpu"]


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    monkeypatch.setattr(calibrate, "_REPEATS", 1)
    state = torch.random.get_rng_state()
    assert main(["calibrate"]) == 0
    assert torch.equal(torch.random.get_rng_state(), state)
    costs = costs_of(CPU)
    assert costs is not DEVICES["cpu"]
    assert all(figure > 0 for figure in (*costs.flops.values(), costs.bytes, costs.random, costs.launch, costs.draw))
    assert costs.gathered >= costs.launch
    shown = capsys.readouterr().out
    assert "gathered operation" in shown
    assert str(own_folder) in shown.replace("\n", "")


def test_no_place_for_it_is_a_named_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "calibrate", lambda: DEVICES["cpu"])
    monkeypatch.setenv("DROPFX_CACHE_DIR", "/dev/null/here")
    assert main(["calibrate"]) != 0
    assert "calibrate: the costs cannot be kept" in capsys.readouterr().err
