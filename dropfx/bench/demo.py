"""`dropfx demo`: one MLP trained three ways in one run: without dropout, with PyTorch's, with dropfx."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import dropfx
from dropfx.bench import arguments, datasets, harness, malloc, report
from dropfx.bench.datasets import Dataset
from dropfx.bench.training import batches, evaluate, mlp, sgd, train_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN, PYTORCH, DROPFX = "no dropout", "PyTorch dropout", "dropfx"
_COLORS = {PLAIN: "#8d99ae", PYTORCH: "#d1495b", DROPFX: "#2a6f97"}


@dataclass
class Way:
    """One of the three ways: its model, and after each epoch the figures of both splits in eval mode.

    `seconds` holds the training time of each epoch, without evaluation; accuracies are 0..1.
    """

    name: str
    model: nn.Module
    seed: int
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = sgd(self.model)
        self.order = torch.Generator().manual_seed(self.seed)

    def train_epoch(self, data: Dataset, batch: int) -> None:
        """One epoch over the training split, then the figures of both splits."""
        start = time.perf_counter()
        for images, labels in batches(data.train, batch, self.order):
            train_step(self.model, self.optimizer, images, labels)
        self.seconds.append(time.perf_counter() - start)
        for split, losses, accuracies in (
            (data.train, self.train_loss, self.train_accuracy),
            (data.test, self.test_loss, self.test_accuracy),
        ):
            loss, accuracy = evaluate(self.model, split)
            losses.append(loss)
            accuracies.append(accuracy)


def make_ways(sizes: Sequence[int], rate: float, seed: int) -> list[Way]:
    """The three candidates, of equal initial weights; `dropfx.compile(model)` is all that the third adds."""
    models = []
    for used_rate in (None, rate, rate):
        torch.manual_seed(seed)
        models.append(mlp(sizes, used_rate))
    dropfx.compile(models[2])
    return [Way(name, model, seed) for name, model in zip((PLAIN, PYTORCH, DROPFX), models, strict=True)]


def train(ways: Sequence[Way], data: Dataset, epochs: int, batch: int, console: Console) -> None:
    """Trains epoch by epoch in turn, so that a drift of the machine's speed hits all ways alike."""
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("epoch {task.completed}/{task.total}  {task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        tasks: list[TaskID] = [progress.add_task(way.name, total=epochs, state="") for way in ways]
        for epoch in range(epochs):
            turn = list(zip(ways, tasks, strict=True))
            shift = epoch % len(turn)
            for way, task in turn[shift:] + turn[:shift]:
                way.train_epoch(data, batch)
                state = f"test {way.test_accuracy[-1]:.1%}, {way.seconds[-1]:.2f} s"
                progress.update(task, advance=1, state=state)


def speed_ups(ways: Sequence[Way]) -> dict[str, harness.Ratio]:
    """Each way's epochs against those of PyTorch's dropout, paired; without the first epoch, which also traces."""
    skip = 1 if len(ways[0].seconds) > 1 else 0
    seconds = {way.name: way.seconds[skip:] for way in ways}
    return {way.name: harness.ratio(seconds, way.name, [PYTORCH]) for way in ways}


def table(ways: Sequence[Way], title: str) -> Table:
    """Accuracy and loss after the last epoch, time of an epoch, speed-up: a row for each way."""
    result = Table(title=title, box=box.SIMPLE_HEAD)
    result.add_column("", no_wrap=True)
    for heading in ("train\nacc.", "test\nacc.", "train\nloss", "test\nloss", "s/epoch", "speed-up"):
        result.add_column(heading, justify="right")
    ratios = speed_ups(ways)
    for way in ways:
        result.add_row(
            way.name,
            f"{way.train_accuracy[-1]:.1%}",
            f"{way.test_accuracy[-1]:.1%}",
            f"{way.train_loss[-1]:.3f}",
            f"{way.test_loss[-1]:.3f}",
            f"{statistics.median(way.seconds):.2f}",
            f"{ratios[way.name].median:.2f}x",
            style="bold" if way.name == DROPFX else "",
        )
    return result


def _draw(ways: Sequence[Way], name: str, axes: Sequence[Axes]) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs, clock = axes
    for way in ways:
        percent = [100 * value for value in way.test_accuracy]
        numbers = range(1, len(percent) + 1)
        # at the median pace: a stall of the machine would shift one curve and not the others
        passed = [number * statistics.median(way.seconds) for number in numbers]
        for axis, positions in ((epochs, numbers), (clock, passed)):
            axis.plot(positions, percent, color=_COLORS[way.name], marker="o", markersize=3, label=way.name)
    epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    epochs.set(title=f"{name}: after the same epochs", xlabel="epoch", ylabel="test accuracy, %")
    clock.set(title=f"{name}: after the same time", xlabel="seconds of training, at the median epoch's pace")
    epochs.legend(frameon=False, loc="lower right")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dropfx demo`."""
    parser.add_argument("--data", metavar="DIR", help="folder of idx files (Fashion-MNIST...); default: MNIST-5k")
    parser.add_argument("--epochs", type=arguments.positive, default=15, help="(default: 15)")
    parser.add_argument(
        "--samples",
        type=arguments.natural,
        default=4000,
        help="training images to use, 0: all (default: 4000, few enough for dropout to matter)",
    )
    parser.add_argument("--test-samples", type=arguments.natural, default=0, help="test images, 0: all (default)")
    parser.add_argument("--batch", type=arguments.positive, default=128, help="batch size (default: 128)")
    parser.add_argument("--hidden", type=arguments.positive, default=2048, help="units per layer (default: 2048)")
    parser.add_argument("--rate", type=arguments.rate, default=0.5, help="drop rate (default: .5)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--out", default="dropfx-demo.png", metavar="PNG", help="chart (default: dropfx-demo.png)")
    arguments.add_malloc(parser)


@malloc.tuned
def main(args: argparse.Namespace) -> int:
    """Trains the three ways, prints the table and writes the chart. Returns the exit status."""
    console = Console()
    data = datasets.load(args.data).head(args.samples, args.test_samples)
    classes = int(torch.cat([data.train.labels, data.test.labels]).max()) + 1
    sizes = (data.train.images.shape[1], args.hidden, args.hidden, classes)
    net = "-".join(map(str, sizes))
    console.print(
        f"{net}, dropout p={args.rate:g}, SGD with momentum, batch {args.batch}; {data.name}: "
        f"{len(data.train)} training and {len(data.test)} test images",
        highlight=False,
    )
    ways = make_ways(sizes, args.rate, args.seed)
    train(ways, data, args.epochs, args.batch, console)
    console.print(table(ways, f"{data.name}, after epoch {args.epochs}"))
    console.print(report.describe(report.machine()), highlight=False)
    console.print(report.chart(Path(args.out), 2, partial(_draw, ways, data.name)), highlight=False)
    return 0
