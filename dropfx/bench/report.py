"""What a benchmark leaves behind: the machine it ran on, JSON, a Markdown table, charts."""

from __future__ import annotations

import copy
import datetime
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dropfx.bench import malloc

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def machine() -> dict[str, str | int | bool]:
    """What a figure depends on: processor, cores, threads, versions, allocator settings, date."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "malloc_settings": malloc.is_tuned(),
        "date": datetime.date.today().isoformat(),
    }


def describe(record: dict[str, str | int | bool]) -> str:
    """The record of `machine` in one line."""
    settings = "raised malloc thresholds" if record["malloc_settings"] else "default malloc"
    return (
        f"{record['cpu']}, {record['cores']} cores, {record['threads']} threads, torch {record['torch']}, "
        f"Python {record['python']}, {settings}, {record['date']}"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` below the machine's record; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")


def write_markdown(path: Path, *tables: Table) -> None:
    """The tables in Markdown, each under its title, and the machine's record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        console = Console(file=file, width=240, no_color=True)
        for table in tables:
            plain = copy.deepcopy(table)
            plain.title, plain.box = None, box.MARKDOWN
            for column in plain.columns:
                column.header = str(column.header).replace(".\n", ".").replace("\n", " ")
            with console.capture() as capture:
                console.print(plain)
            rows = [line.rstrip() for line in capture.get().splitlines()]
            file.write(f"**{table.title}**\n\n" + "\n".join(row for row in rows if row) + "\n\n")
        file.write(describe(machine()) + "\n")


def chart(path: Path, panels: int, draw: Callable[[list[Axes]], None], width: float = 5.0) -> str:
    """Draws `panels` axes side by side into a PNG; returns one line for the user, also where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no chart: matplotlib is not installed (extra `plot`)"
    # no pyplot: it would start a window system's backend and keep the figure
    figure = Figure(figsize=(width * panels, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    draw(axes)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return f"chart: {path}"
