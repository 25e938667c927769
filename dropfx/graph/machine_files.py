"""Where what was measured on this machine is kept."""

from __future__ import annotations

import json
import os
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def folder() -> Path:
    """$DROPFX_CACHE_DIR, or `dropfx` in the user's cache folder."""
    given = os.environ.get("DROPFX_CACHE_DIR")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dropfx"


def file_name(device: torch.device) -> str:
    """Names the device and all versions that a time depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = (f"{package}-{metadata.version(package)}" for package in ("dropfx", "torch", "triton"))
    return re.sub(r"[^\w.+-]+", "-", "_".join([name, f"cuda-{torch.version.cuda}", *versions])) + ".json"


def read(path: Path) -> Any:
    """What a file holds; None where it is not there, not readable, or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write(path: Path, content: Any) -> None:
    """Replace the whole file at once, so that several processes may write.

    Raises:
        OSError: there is no place for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
