"""Where what was measured is kept, and files that hold nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dropfx.graph import machine_files


def test_file_name_has_device_and_versions() -> None:
    name = machine_files.file_name(torch.device("cpu"))
    assert torch.__version__ in name
    assert "triton-" in name
    assert "dropfx-" in name
    assert name.endswith(".json")
    assert "/" not in name


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.delenv("DROPFX_CACHE_DIR", raising=False)
    assert machine_files.folder() == Path("/cache/dropfx")
    monkeypatch.setenv("DROPFX_CACHE_DIR", "/elsewhere")
    assert machine_files.folder() == Path("/elsewhere")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    machine_files.write(path, {"a": [1, 2.5]})
    assert machine_files.read(path) == json.loads(path.read_text()) == {"a": [1, 2.5]}
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("content", [None, "", "no JSON"])
def test_what_cannot_be_read_is_nothing(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    assert machine_files.read(path) is None
