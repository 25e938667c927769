"""`dropfx bench paper`: the MLPs of Approximate Random Dropout (arXiv 1805.08939) with all patterns."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import dropfx
from dropfx.bench import arguments, datasets, fidelity, harness, malloc, report
from dropfx.bench.datasets import Dataset
from dropfx.bench.fidelity import BERNOULLI, NONE, Outcome
from dropfx.bench.mlp import Case, flop_ceiling
from dropfx.bench.training import mlp, sgd, train_step
from dropfx.errors import InvalidOption
from dropfx.planning.timing import Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NETS = tuple((784, a, b, 10) for a, b in ((1024, 64), (1024, 1024), (2048, 2048), (4096, 4096)))
BATCHES = (128, 1024)
RATES = (0.3, 0.5, 0.7)
PATTERNS = ("row", "tile", "block", "slice")
PAPER = "the paper, GPU, its rates .3 to .7: 1.18-2.16x on MLPs; its abstract: 20-77% less time, 1.20-1.77x if read so"
_TURN_SECONDS = 0.5
_COLOURS = ("#2a6f97", "#468faf", "#d1495b", "#edae49")


@dataclass(frozen=True)
class Timing:
    """Seconds a training step of one case, by round: `bernoulli` and each pattern; FLOP ceiling of each pattern.

    The kept count of `row` and `tile` varies by step, so a speed-up is a ratio of means over all steps.
    """

    case: Case
    seconds: dict[str, list[float]]
    ceilings: dict[str, float]

    def speed_up(self, pattern: str) -> float:
        """Mean seconds of PyTorch's dropout by those of the pattern. KeyError: the pattern was not timed."""
        return statistics.mean(self.seconds[BERNOULLI]) / statistics.mean(self.seconds[pattern])


def tile_ceiling(sizes: Sequence[int], rate: float) -> float:
    """As `mlp.flop_ceiling`, where each weight after a dropout keeps 1 - rate of its tiles and nothing else shrinks."""
    weights = [2] + [3] * (len(sizes) - 2)
    dense = [w * n * m for w, (n, m) in zip(weights, pairwise(sizes), strict=True)]
    return sum(dense) / (dense[0] + (1 - rate) * sum(dense[1:]))


def measure(case: Case, patterns: Sequence[str], rounds: int) -> Timing:
    """Eager PyTorch with its own dropout against every pattern, from the same weights, on the same batch, in turns."""
    torch.manual_seed(0)
    dense = mlp(case.sizes, case.rate)
    images = torch.randn(case.batch, case.sizes[0])
    labels = torch.randint(case.sizes[-1], (case.batch,))
    steps: dict[str, Step] = {}
    for name in (BERNOULLI, *patterns):
        model = copy.deepcopy(dense)
        if name != BERNOULLI:
            dropfx.compile(model, pattern=name)
        steps[name] = partial(train_step, model, sgd(model), images, labels)
    seconds = harness.interleave(steps, rounds, _TURN_SECONDS)
    keeps = [1 - case.rate] * (len(case.sizes) - 2)
    units, tiles = flop_ceiling(case.sizes, keeps), tile_ceiling(case.sizes, case.rate)
    return Timing(case, seconds, {name: tiles if name == "tile" else units for name in patterns})


def train_all(data: Dataset, rate: float, args: argparse.Namespace, progress: Progress) -> Iterator[Outcome]:
    """Test accuracies at one rate, by variant and seed: after each seed, what is known so far."""
    settings = argparse.Namespace(net=args.accuracy_net, rate=rate, batch=128, seeds=args.seeds, schedule="constant")
    settings.variants = [NONE, BERNOULLI, *args.patterns]
    return fidelity.compare(data, args.epochs, settings, progress)


def time_table(timings: Sequence[Timing]) -> Table:
    """Speed-ups, each with its FLOP ceiling."""
    names = list(timings[0].ceilings)
    table = Table(
        title="Speed-up of a training step against eager PyTorch dropout (FLOP ceiling)",
        caption=PAPER,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("net", "batch", "p", "dense, ms", *names):
        table.add_column(heading, justify="right", no_wrap=True)
    for timing in timings:
        cells = [f"{timing.speed_up(name):.2f}x ({timing.ceilings[name]:.2f})" for name in names]
        milliseconds = f"{statistics.mean(timing.seconds[BERNOULLI]) * 1e3:.1f}"
        table.add_row(timing.case.net, str(timing.case.batch), f"{timing.case.rate:g}", milliseconds, *cells)
    return table


def accuracy_table(outcomes: dict[float, Outcome], net: Sequence[int]) -> Table:
    """Accuracy by rate and variant, and what is lost against PyTorch's dropout."""
    title = f"Test accuracy, {'-'.join(map(str, net))}, and points lost against PyTorch dropout, paired by seed"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("data", "p", "dropout", "accuracy %", "lost", "upper 95% bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rate, outcome in outcomes.items():
        for variant, values in outcome.accuracy.items():
            loss = outcome.loss(variant)
            lost = "" if variant == BERNOULLI else f"{loss.mean:+.2f}"
            bound = "" if variant == BERNOULLI or loss.bound is None else f"{loss.bound:+.2f}"
            table.add_row(outcome.dataset, f"{rate:g}", variant, f"{statistics.mean(values):.2f}", lost, bound)
    return table


def _draw(timings: Sequence[Timing], axes: Sequence[Axes]) -> None:
    panels: dict[tuple[str, int], list[Timing]] = {}
    for timing in timings:
        panels.setdefault((timing.case.net, timing.case.batch), []).append(timing)
    for axis, ((net, batch), members) in zip(axes, panels.items(), strict=True):
        names = list(members[0].ceilings)
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(members))]
            colour = _COLOURS[number % len(_COLOURS)]
            axis.bar(places, [t.speed_up(name) for t in members], width=width, color=colour, label=name)
            ends = [p - width / 2 for p in places], [p + width / 2 for p in places]
            axis.hlines([t.ceilings[name] for t in members], *ends, color="#333333", linewidth=0.8)
        axis.axhline(1, color="#555555", linewidth=0.8)
        axis.set_xticks(range(len(members)), [f"p = {t.case.rate:g}" for t in members])
        axis.set_title(f"{net}, batch {batch}", fontsize=9)
    axes[0].set_ylabel("speed-up (line: FLOP ceiling)")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dropfx bench paper`."""
    parser.add_argument("--nets", nargs="+", type=arguments.net, default=list(NETS), help="(784-A-B-10, the paper's)")
    parser.add_argument("--batch", nargs="+", type=arguments.positive, default=list(BATCHES), help="(128 1024)")
    parser.add_argument("--rates", nargs="+", type=arguments.rate, default=list(RATES), help="drop rates (.3 .5 .7)")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), help="(row tile block slice)")
    parser.add_argument("--rounds", type=arguments.natural, default=8, help="of turns; 0: no times (default: 8)")
    parser.add_argument("--accuracy-net", type=arguments.net, default=(784, 2048, 2048, 10), help="(784-2048-2048-10)")
    parser.add_argument("--seeds", type=arguments.natural, default=3, help="of the accuracies; 0: none (default: 3)")
    parser.add_argument("--epochs", type=arguments.positive, default=20, help="of the accuracies (default: 20)")
    parser.add_argument("--samples", type=arguments.natural, default=0, help="training images, 0: all (default)")
    parser.add_argument("--out", default="dropfx-bench", metavar="DIR", help="folder of paper.json, .md, .png")
    arguments.add_malloc(parser)


@malloc.tuned
def main(args: argparse.Namespace) -> int:
    """Times all cases, trains one net for accuracy, writes JSON, Markdown and a chart. Returns the exit status."""
    if not (args.rounds or args.seeds):
        raise InvalidOption("--rounds and --seeds: got 0 for both: neither times nor accuracies to measure")
    console, folder = Console(), Path(args.out)
    timings: list[Timing] = []
    outcomes: dict[float, Outcome] = {}
    with Progress(console=console) as progress:
        cases = [Case(*case) for case in product(args.nets, args.batch, args.rates)]
        for case in progress.track(cases if args.rounds else [], description="training steps"):
            timings.append(measure(case, args.patterns, args.rounds))
        if args.seeds:
            data = datasets.load().head(args.samples)
            for rate in args.rates:
                for outcome in train_all(data, rate, args, progress):
                    outcomes[rate] = outcome
                    # after each seed: a long run that ends early keeps what it has
                    _write(folder, timings, outcomes, args)
    tables = [time_table(timings)] if timings else []
    if outcomes:
        tables.append(accuracy_table(outcomes, args.accuracy_net))
    for table in tables:
        console.print(table)
    _write(folder, timings, outcomes, args)
    report.write_markdown(folder / "paper.md", *tables)
    if timings:
        panels = len(args.nets) * len(args.batch)
        line = report.chart(folder / "paper.png", panels, partial(_draw, timings), width=3.2)
        console.print(line, highlight=False)
    console.print(f"figures: {folder / 'paper.json'}", highlight=False)
    return 0


def _write(folder: Path, timings: Sequence[Timing], outcomes: dict[float, Outcome], args: argparse.Namespace) -> None:
    content = {
        "timings": [asdict(timing) for timing in timings],
        "accuracy": [{"rate": rate, "epochs": args.epochs, **asdict(o)} for rate, o in outcomes.items()],
        "paper": PAPER,
    }
    report.write_json(folder / "paper.json", content)
