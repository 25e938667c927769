"""Tables and chart of the benches that time training steps: `dropfx bench mlp` and `lstm`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from dropfx.bench import report
from dropfx.bench.steps import Result, options_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIB = 2**20


@dataclass(frozen=True)
class Paper:
    """What a publication states about such nets: in words, and the lowest and highest speed-up."""

    text: str
    low: float
    high: float


def show_and_write(
    console: Console,
    name: str,
    results: Sequence[Result],
    args: argparse.Namespace,
    extra: Mapping[str, object] | None = None,
    paper: Paper | None = None,
) -> None:
    """Prints the tables; writes them as Markdown, all figures and `extra` as JSON, and a chart, in files `name`.*."""
    tables = [time_table(results), ceiling_table(results, paper), memory_table(results)]
    for table in tables:
        console.print(table)
    console.print(report.describe(report.machine()), highlight=False)
    folder = Path(args.out)
    content = {"options": options_of(args), "cases": [asdict(result) for result in results], **(extra or {})}
    report.write_json(folder / f"{name}.json", content)
    report.write_markdown(folder / f"{name}.md", *tables)
    count, draw = panels(results, paper)
    line = report.chart(folder / f"{name}.png", count, draw, width=5.0 if count <= 3 else 3.2)
    console.print(f"{line}\nfigures: {folder / f'{name}.json'}", highlight=False)


def time_table(results: Sequence[Result]) -> Table:
    """Milliseconds per training step, and the ratio to the faster baseline."""
    names = list(results[0].seconds)
    table = _table("Training step, ms, and speed-up against the faster baseline", *names)
    table.add_column("speed-up", justify="right", style="bold")
    table.add_column("quartiles", justify="right")
    for result in results:
        table.add_row(
            *_case(result),
            *(f"{statistics.median(result.seconds[name]) * 1e3:.1f}" for name in names),
            _times(result.ratio.median),
            f"{result.ratio.low:.2f}-{result.ratio.high:.2f}",
        )
    return table


def ceiling_table(results: Sequence[Result], paper: Paper | None = None) -> Table:
    """FLOP ceilings of the asked and the drawn rate, the share that is reached, the ratio with malloc's defaults.

    `sites` are the dropouts that are rewritten, and all; `draws` how many each of them has a batch.
    """
    headings = ("sites", "draws", "FLOP\nceiling", "share", "drawn p", "drawn\nceiling", "default\nmalloc")
    table = _table("Share of the FLOP ceiling, and speed-up with malloc's defaults", *headings)
    table.caption = paper.text if paper else None
    for result in results:
        table.add_row(
            *_case(result),
            f"{result.rewritten}/{len(result.drawn_rates)}",
            "/".join(str(draws) for draws in dict.fromkeys(result.draws) if draws),
            _times(result.ceiling),
            f"{result.ratio.median / result.ceiling:.0%}",
            _rates(result.drawn_rates),
            _times(result.ceiling_drawn),
            "-" if result.ratio_system_malloc is None else _times(result.ratio_system_malloc.median),
        )
    return table


def _rates(drawn: Sequence[float]) -> str:
    """The different rates of the sites; of many the lowest and the highest."""
    named = list(dict.fromkeys(f"{rate:.3f}" for rate in drawn))
    return "/".join(named) if len(named) < 4 else f"{min(named)}-{max(named)}"


def memory_table(results: Sequence[Result]) -> Table:
    """Peak MiB of a step above the resting level."""
    names = list(results[0].peak_bytes)
    table = _table("Peak memory of a step above the resting level, MiB", *names)
    for result in results:
        table.add_row(*_case(result), *(f"{result.peak_bytes[name] / _MIB:.2f}" for name in names))
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("net", "batch", "p", *headings):
        table.add_column(heading.replace("torch.", "torch.\n"), justify="right", no_wrap=True)
    return table


def _case(result: Result) -> tuple[str, str, str]:
    return result.case.net, str(result.case.batch), f"{result.case.rate:g}"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def panels(results: Sequence[Result], paper: Paper | None = None) -> tuple[int, Callable[[list[Axes]], None]]:
    """Number of panels, one a net and batch, and what draws them."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.case.net, result.case.batch), []).append(result)

    def draw(axes: list[Axes]) -> None:
        """A panel for each net and batch, with the paper's range behind the bars."""
        for axis, ((net, batch), members) in zip(axes, groups.items(), strict=True):
            if paper is not None:
                axis.axhspan(paper.low, paper.high, color="#edae49", alpha=0.25, linewidth=0, label="the paper, GPU")
            _bars(axis, members)
            axis.set_title(f"{net}, batch {batch}", fontsize=10)
        axes[0].set_ylabel("speed-up of a training step")
        axes[0].legend(frameon=False, fontsize=8, loc="upper left")

    return len(groups), draw


def _bars(axis: Axes, results: Sequence[Result]) -> None:
    places = list(range(len(results)))
    medians = [result.ratio.median for result in results]
    below = [result.ratio.median - result.ratio.low for result in results]
    above = [result.ratio.high - result.ratio.median for result in results]
    axis.bar(places, medians, width=0.55, yerr=[below, above], capsize=3, color="#2a6f97", label="dropfx")
    ceilings = [result.ceiling for result in results]
    axis.hlines(ceilings, [p - 0.4 for p in places], [p + 0.4 for p in places], color="#d1495b", label="FLOP ceiling")
    axis.axhline(1, color="#555555", linewidth=0.8)
    for place, median in zip(places, medians, strict=True):
        axis.annotate(f"{median:.2f}x", (place, 0), (0, 4), textcoords="offset points", ha="center", color="white")
    axis.set_xticks(places, [f"p = {result.case.rate:g}" for result in results])
