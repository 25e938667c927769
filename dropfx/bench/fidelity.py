"""`dropfx bench fidelity`: test accuracy of structured patterns against PyTorch's dropout, paired by seed."""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler

import dropfx
from dropfx import patterns
from dropfx.bench import arguments, datasets, malloc, report
from dropfx.bench.datasets import Dataset
from dropfx.bench.training import batches, evaluate, mlp, sgd, train_step
from dropfx.errors import InvalidOption

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NONE, BERNOULLI = "none", "bernoulli"
_LATTICES = {"row": patterns.Row, "tile": patterns.Tile}
VARIANTS = (NONE, BERNOULLI, "block", "slice")
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, epochs: ConstantLR(optimizer, factor=1.0),
    "cosine": CosineAnnealingLR,
}
"""Learning rate over the epochs: the founding paper's constant one, or falling to zero, which settles the accuracy."""
# one-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom
_T95 = (
    *(6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812),
    *(1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725),
    *(1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697),
)


@dataclass(frozen=True)
class Loss:
    """Accuracy lost against PyTorch's dropout, in points: mean over the seeds and its one-sided upper 95% bound."""

    mean: float
    bound: float | None


@dataclass(frozen=True)
class Outcome:
    """Accuracies in percent of one data set: of each variant, by seed."""

    dataset: str
    seeds: list[int]
    accuracy: dict[str, list[float]]

    def loss(self, variant: str) -> Loss:
        """Points lost by a variant against PyTorch's dropout, paired by seed. KeyError: the variant was not trained."""
        return paired_loss(self.accuracy[BERNOULLI], self.accuracy[variant])


def paired_loss(reference: Sequence[float], accuracy: Sequence[float]) -> Loss:
    """Paired t: mean of reference - accuracy, plus t(.95, n - 1) standard errors; no bound from a single pair."""
    lost = [a - b for a, b in zip(reference, accuracy, strict=True)]
    mean = statistics.mean(lost)
    if len(lost) < 2:
        return Loss(mean, None)
    quantile = _T95[min(len(lost) - 1, len(_T95)) - 1]
    return Loss(mean, mean + quantile * statistics.stdev(lost) / math.sqrt(len(lost)))


def options_of(variant: str) -> dict[str, Any] | None:
    """Options of `dropfx.compile` for a variant: a pattern's name, with `:N` for max_period N, `@G` for G groups,
    `@time` or `@auto`; None for `none` and `bernoulli`.

    Raises:
        InvalidOption: unknown pattern, or a period or groups that are no numbers.
    """
    if variant in (NONE, BERNOULLI):
        return None
    found = re.fullmatch(r"(\w+)(?::(\d+))?(?:@(\d+|time|auto))?", variant)
    if found is None or found[1] not in patterns.BY_NAME or (found[2] and found[1] not in _LATTICES):
        raise InvalidOption(
            f"variant: got {variant!r}, accepted are {NONE}, {BERNOULLI}, {', '.join(patterns.BY_NAME)},"
            " such as block@4, block@time and block@auto (groups), row:2 (period)"
        )
    pattern = _LATTICES[found[1]](max_period=int(found[2])) if found[2] else found[1]
    groups = found[3] if found[3] in ("time", "auto") else int(found[3] or 1)
    # every site is rewritten, whether it pays or not: what is compared is accuracy
    return {"pattern": pattern, "groups": groups, "min_speedup": 0}


def prepare(variant: str, sizes: Sequence[int], rate: float) -> nn.Module:
    """The net of a variant. InvalidOption: no such variant."""
    options = options_of(variant)
    model = mlp(sizes, None if variant == NONE else rate)
    return model if options is None else dropfx.compile(model, **options)


def train(variant: str, data: Dataset, seed: int, args: argparse.Namespace, epochs: int) -> float:
    """Test accuracy in percent, the mean over the last fifth of the epochs (one epoch's result is noisy).

    The seed sets weights and batch order, alike for every variant, and the masks.
    """
    torch.manual_seed(seed)
    model = prepare(variant, args.net, args.rate)
    optimizer = sgd(model)
    schedule = SCHEDULES[args.schedule](optimizer, epochs)
    order = torch.Generator().manual_seed(seed)
    accuracies = []
    for epoch in range(epochs):
        for images, labels in batches(data.train, args.batch, order):
            train_step(model, optimizer, images, labels)
        schedule.step()
        if epoch >= epochs - max(1, epochs // 5):
            accuracies.append(evaluate(model, data.test)[1])
    return 100 * statistics.mean(accuracies)


def compare(data: Dataset, epochs: int, args: argparse.Namespace, progress: Progress) -> Iterator[Outcome]:
    """All variants with all seeds on one data set: after each seed, what is known so far."""
    variants = list(dict.fromkeys([BERNOULLI, *args.variants]))
    task = progress.add_task(data.name, total=args.seeds * len(variants))
    accuracy: dict[str, list[float]] = {variant: [] for variant in variants}
    for seed in range(args.seeds):
        for variant in variants:
            progress.update(task, description=f"{data.name}, seed {seed}, {variant}")
            accuracy[variant].append(train(variant, data, seed, args, epochs))
            progress.advance(task)
        yield Outcome(data.name, list(range(seed + 1)), {variant: list(found) for variant, found in accuracy.items()})


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row a data set and variant."""
    result = Table(title="Test accuracy against PyTorch dropout, paired by seed")
    for heading in ("data", "dropout", "accuracy %", "lost, points", "upper 95% bound"):
        result.add_column(heading, justify="left" if heading in ("data", "dropout") else "right")
    for outcome in outcomes:
        for variant, values in outcome.accuracy.items():
            loss = outcome.loss(variant)
            lost = "" if variant == BERNOULLI else f"{loss.mean:+.2f}"
            bound = "" if variant == BERNOULLI or loss.bound is None else f"{loss.bound:+.2f}"
            result.add_row(outcome.dataset, variant, f"{statistics.mean(values):.2f}", lost, bound)
    return result


def _draw(outcomes: Sequence[Outcome], axes: Sequence[Axes]) -> None:
    for axis, outcome in zip(axes, outcomes, strict=True):
        for place, (_variant, values) in enumerate(outcome.accuracy.items()):
            axis.scatter([place] * len(values), values, s=18, color="#2a6f97", alpha=0.6)
            axis.hlines(statistics.mean(values), place - 0.3, place + 0.3, color="#d1495b")
        axis.set_xticks(range(len(outcome.accuracy)), list(outcome.accuracy))
        axis.set_title(f"{outcome.dataset}, {len(outcome.seeds)} seeds", fontsize=10)
    axes[0].set_ylabel("test accuracy, %")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dropfx bench fidelity`."""
    parser.add_argument("--data", action="append", metavar="DIR", help="also this data set, idx files (repeatable)")
    parser.add_argument("--net", type=arguments.net, default=(784, 2048, 2048, 10), help="(784-2048-2048-10)")
    parser.add_argument("--rate", type=arguments.rate, default=0.5, help="drop rate (default: .5)")
    parser.add_argument("--batch", type=arguments.positive, default=128, help="batch size (default: 128)")
    parser.add_argument("--seeds", type=arguments.positive, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--epochs", type=arguments.natural, default=30, help="of the embedded data, 0: not at all (30)")
    parser.add_argument("--data-epochs", type=arguments.positive, default=5, help="of each DIR (default: 5)")
    parser.add_argument("--schedule", choices=SCHEDULES, default="constant", help="learning rate (default: constant)")
    parser.add_argument("--samples", type=arguments.natural, default=0, help="training images, 0: all (default)")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        metavar="NAME",
        help="none, bernoulli, a pattern; row:2 sets max_period, block@4 groups (none bernoulli block slice)",
    )
    parser.add_argument("--out", default="dropfx-bench", metavar="DIR", help="folder of fidelity.json, .md, .png")
    arguments.add_malloc(parser)


@malloc.tuned
def main(args: argparse.Namespace) -> int:
    """Trains all variants, prints the table and writes JSON, Markdown and a chart. Returns the exit status."""
    console = Console()
    runs = [(datasets.load(), args.epochs)] if args.epochs else []
    runs += [(datasets.load(folder), args.data_epochs) for folder in args.data or []]
    folder = Path(args.out)
    if not runs:
        raise InvalidOption("--epochs: got 0, which leaves the embedded data out, and no --data: nothing to train on")
    outcomes: list[Outcome] = []
    with Progress(console=console) as progress:
        for place, (data, epochs) in enumerate(runs):
            for outcome in compare(data.head(args.samples), epochs, args, progress):
                outcomes[place:] = [outcome]
                # after each seed: a long run that ends early keeps what it has
                report.write_json(folder / "fidelity.json", _content(outcomes, args))
    console.print(table(outcomes))
    report.write_markdown(folder / "fidelity.md", table(outcomes))
    console.print(report.chart(folder / "fidelity.png", len(outcomes), partial(_draw, outcomes)), highlight=False)
    console.print(f"figures: {folder / 'fidelity.json'}", highlight=False)
    return 0


def _content(outcomes: Sequence[Outcome], args: argparse.Namespace) -> dict[str, object]:
    settings = ("net", "rate", "batch", "epochs", "data_epochs", "schedule", "samples")
    losses = [{name: asdict(outcome.loss(name)) for name in outcome.accuracy} for outcome in outcomes]
    return {
        "settings": {name: getattr(args, name) for name in settings},
        "outcomes": [{**asdict(outcome), "loss": loss} for outcome, loss in zip(outcomes, losses, strict=True)],
    }
