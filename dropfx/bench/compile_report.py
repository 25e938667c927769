"""Tables and chart of `dropfx bench compile`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from dropfx.bench import report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dropfx.bench.compile import Result


def tables(results: Sequence[Result]) -> list[Table]:
    """Steps and speed-ups, a row a case; compile times, where they were measured."""
    timed = [result for result in results if result.compile_ratio is not None]
    return [step_table(results), speed_up_table(results), *([compile_table(timed)] if timed else [])]


def show(console: Console, results: Sequence[Result]) -> None:
    """Prints the tables and the machine."""
    for table in tables(results):
        console.print(table)
    console.print(report.describe(report.machine()), highlight=False)


def step_table(results: Sequence[Result]) -> Table:
    """Milliseconds per training step of each candidate."""
    names = list(results[0].seconds)
    table = _table("Training step, ms", *names)
    for result in results:
        table.add_row(*_case(result), *(f"{statistics.median(result.seconds[name]) * 1e3:.1f}" for name in names))
    return table


def speed_up_table(results: Sequence[Result]) -> Table:
    """The backend against each other candidate, and what the FLOPs predict."""
    baselines = list(results[0].ratios)
    table = _table(
        'Speed-up of torch.compile(backend="dropfx") against each, and by FLOPs',
        *baselines,
        "quartiles against torch.compile",
        "by FLOPs",
        "dropouts rewritten",
    )
    for result in results:
        compiled = result.ratios["torch.compile"]
        table.add_row(
            *_case(result),
            *(f"{result.ratios[name].median:.2f}x" for name in baselines),
            f"{compiled.low:.2f}-{compiled.high:.2f}",
            f"{result.ceiling:.2f}x",
            f"{result.rewritten} of {result.sites}",
        )
    return table


def compile_table(results: Sequence[Result]) -> Table:
    """Seconds until the end of the first step in a fresh process."""
    names = list(results[0].first_steps)
    title = "Seconds until the end of the first training step, in a fresh process with empty caches"
    table = _table(title, *names, "ratio", "quartiles")
    for result in results:
        ratio = result.compile_ratio
        assert ratio is not None
        table.add_row(
            *_case(result),
            *(f"{statistics.median(result.first_steps[name]):.1f}" for name in names),
            f"{ratio.median:.2f}x",
            f"{ratio.low:.2f}-{ratio.high:.2f}",
        )
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for heading in ("p", *headings):
        table.add_column(heading.replace(" ", "\n", 1).replace(".", ".\n"), justify="right", no_wrap=True)
    return table


def _case(result: Result) -> tuple[str, str]:
    return result.name, f"{result.rate:g}"


def draw(results: Sequence[Result], axes: Sequence[Axes]) -> None:
    """A bar a case: speed-up against torch.compile, with quartiles; a line for what the FLOPs predict."""
    (axis,) = axes
    places = list(range(len(results)))
    ratios = [result.ratios["torch.compile"] for result in results]
    errors = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
    axis.bar(places, [r.median for r in ratios], width=0.55, yerr=errors, capsize=3, color="#2a6f97")
    ceilings = [result.ceiling for result in results]
    axis.hlines(ceilings, [p - 0.4 for p in places], [p + 0.4 for p in places], color="#d1495b", label="by FLOPs")
    axis.axhline(1, color="#555555", linewidth=0.8)
    axis.set_xticks(places, [f"{result.name}, p={result.rate:g}" for result in results], rotation=60, ha="right")
    axis.tick_params(axis="x", labelsize=7)
    axis.set_ylabel("speed-up against torch.compile")
    axis.legend(frameon=False, fontsize=8)
