"""`dropfx bench predictions`: what `explain` predicts of a step, beside what is measured, on small and large layers."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dropfx
from dropfx.bench import arguments, harness, malloc, report
from dropfx.bench.training import mlp
from dropfx.graph.device_costs import measured
from dropfx.planning.timing import Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTHS = (32, 64, 128, 256, 512, 1024, 2048)
BATCHES = (16, 128, 1024)
RATES = (0.1, 0.3, 0.5, 0.7)
EAGER, DEFAULT, ALL = "eager", "default", "all rewritten"
MODELS = ("mlp", "transformer")
_HEADS, _STEPS = 4, 16


@dataclass(frozen=True)
class Case:
    """A model of one width: an MLP of three layers, or a TransformerEncoder of two on sequences of 16 steps."""

    model: str
    width: int
    batch: int
    rate: float

    def build(self) -> tuple[nn.Module, Tensor]:
        """The model, and its input of `batch` rows."""
        if self.model == "mlp":
            return mlp((self.width,) * 4, self.rate), torch.randn(self.batch, self.width)
        layer = nn.TransformerEncoderLayer(self.width, _HEADS, 4 * self.width, self.rate, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return model, torch.randn(max(self.batch // _STEPS, 1), _STEPS, self.width)


@dataclass(frozen=True)
class Result:
    """A case's training steps, forward and backward.

    Attributes:
        seconds: candidate -> seconds per step, an entry per round.
        default, everything: measured speed-up against eager, at the default `min_speedup` and with 0.
        predicted: of the step with everything rewritten that can be.
        rewritten, sites: dropouts rewritten by default, and how many can be.
    """

    case: Case
    seconds: dict[str, list[float]]
    default: float
    everything: float
    predicted: float
    rewritten: int
    sites: int

    @property
    def error(self) -> float:
        """By which share the predicted speed-up differs from the measured one."""
        return abs(self.predicted / self.everything - 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dropfx bench predictions`."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    parser.add_argument("--widths", nargs="+", type=arguments.positive, default=list(WIDTHS), help="units of a layer")
    parser.add_argument("--batch", nargs="+", type=arguments.positive, default=list(BATCHES), help="rows of the input")
    parser.add_argument("--rates", nargs="+", type=arguments.rate, default=list(RATES), help="drop rates")
    parser.add_argument("--rounds", type=arguments.positive, default=7, help="rounds of turns (default: 7)")
    parser.add_argument("--out", default="dropfx-bench", metavar="DIR", help="folder of predictions.json, .md, .png")
    arguments.add_malloc(parser)


@malloc.tuned
def main(args: argparse.Namespace) -> int:
    """Runs the benchmark, prints its tables and writes JSON, Markdown and a chart. Returns the exit status."""
    console = Console()
    results = []
    with console.status("") as status:
        for case in [Case(*parts) for parts in product(args.models, args.widths, args.batch, args.rates)]:
            status.update(f"{case.model} of {case.width} units, batch {case.batch}, p={case.rate:g}")
            results.append(measure(case, args.rounds))
    tables = case_table(results), summary_table(results)
    for table in tables:
        console.print(table)
    console.print(report.describe(report.machine()), highlight=False)
    folder = Path(args.out)
    content: dict[str, Any] = {"calibrated": _calibrated(), "cases": [asdict(result) for result in results]}
    report.write_json(folder / "predictions.json", content)
    report.write_markdown(folder / "predictions.md", *tables)
    console.print(report.chart(folder / "predictions.png", 1, lambda axes: draw(axes[0], results)), highlight=False)
    return 0


def measure(case: Case, rounds: int) -> Result:
    """Steps of the model as written, compiled with defaults, and with all rewritten, in turn."""
    torch.manual_seed(0)
    model, x = case.build()
    models: dict[str, nn.Module] = {
        EAGER: copy.deepcopy(model),
        DEFAULT: dropfx.compile(copy.deepcopy(model)),
        ALL: dropfx.compile(copy.deepcopy(model), min_speedup=0),
    }

    def step(model: nn.Module) -> Step:
        """Forward and backward of the sum of the outputs."""
        return lambda: torch.autograd.backward(model(x).sum())

    seconds = harness.interleave({name: step(each) for name, each in models.items()}, rounds, turn_seconds=0.1)
    by_default = dropfx.explain(model, x).sites
    everything = dropfx.explain(model, x, options={"min_speedup": 0})
    torch.compiler.reset()
    return Result(
        case=case,
        seconds=seconds,
        default=harness.ratio(seconds, DEFAULT, [EAGER]).median,
        everything=harness.ratio(seconds, ALL, [EAGER]).median,
        predicted=everything.predicted_speedup,
        rewritten=sum(site.rewritten for site in by_default),
        sites=sum(site.rewritten for site in everything.sites),
    )


def _calibrated() -> bool:
    return measured(torch.device("cpu")) is not None


# -- tables and chart -----------------------------------------------------------------------------------------------


def case_table(results: Sequence[Result]) -> Table:
    """A row per case."""
    table = Table(
        "model", "units", "batch", "p", "eager, ms", "rewritten", "default", "all", "predicted", box=box.MARKDOWN
    )
    for result in results:
        case = result.case
        table.add_row(
            case.model,
            str(case.width),
            str(case.batch),
            f"{case.rate:g}",
            f"{1e3 * statistics.median(result.seconds[EAGER]):.2f}",
            f"{result.rewritten} of {result.sites}",
            f"{result.default:.2f}x",
            f"{result.everything:.2f}x",
            f"{result.predicted:.2f}x",
        )
    return table


def summary_table(results: Sequence[Result]) -> Table:
    """The worst step at default options, and how far predictions are off, per kind of model."""
    costs = "costs measured by `dropfx calibrate`" if _calibrated() else "the table's costs"
    table = Table(
        "model", "worst default", "default below .97x", "median error", "worst error", title=costs, box=box.MARKDOWN
    )
    for name in dict.fromkeys(result.case.model for result in results):
        of_model = [result for result in results if result.case.model == name]
        errors = [result.error for result in of_model]
        table.add_row(
            name,
            f"{min(result.default for result in of_model):.2f}x",
            f"{sum(result.default < 0.97 for result in of_model)} of {len(of_model)}",
            f"{100 * statistics.median(errors):.0f}%",
            f"{100 * max(errors):.0f}%",
        )
    return table


def draw(axis: Axes, results: Sequence[Result]) -> None:
    """Predicted against measured speed-ups of steps with all rewritten, and the measured one by default."""
    predicted = [result.predicted for result in results]
    axis.loglog(predicted, [result.everything for result in results], ".", label="all rewritten")
    axis.loglog(predicted, [result.default for result in results], "x", label="by default")
    ends = [min(predicted), max(predicted)]
    axis.plot(ends, ends, color="grey", linewidth=1)
    axis.axhline(1, color="grey", linewidth=0.5)
    axis.set_xlabel("predicted speed-up of a step with all rewritten")
    axis.set_ylabel("measured")
    axis.legend()
