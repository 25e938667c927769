"""`dropfx bench lstm`: whole training steps of a two-layer LSTM language model, interleaved in one run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn

from dropfx.bench import arguments, language_model, malloc, steps, steps_report
from dropfx.bench.language_model import LanguageModel
from dropfx.bench.steps import Workload
from dropfx.bench.steps_report import Paper
from dropfx.planning.timing import Step

LAYERS = 2
UNITS = (650, 1500)
VOCABULARIES = (8800, 10_000)
BATCHES = (20, 64)
PAPER = Paper(
    "the paper, GPU, 2x1500, vocabulary 8800, its rates .3 to .7: 1.24-1.85x on LSTMs; its abstract: 19-60% less time,"
    " 1.19-1.60x if read so",
    1.24,
    1.85,
)


@dataclass(frozen=True)
class Case:
    """Units of a layer, words, columns of text side by side, drop rate, steps of a window."""

    units: int
    vocabulary: int
    batch: int
    rate: float
    window: int = language_model.WINDOW

    @property
    def net(self) -> str:
        """Layers, units of each and vocabulary, for tables."""
        return f"{LAYERS}x{self.units}, {self.vocabulary}"

    def workload(self) -> Workload:
        """The language model, and its step on one window of random words [window, batch]."""
        model = LanguageModel(self.vocabulary, self.units, self.rate, LAYERS)
        text = torch.randint(self.vocabulary, (self.window + 1, self.batch))

        def make_step(runnable: Callable[..., Any], model: nn.Module) -> Step:
            """A step on the same window, which carries the state on."""
            return language_model.stepper(runnable, cast(LanguageModel, model), text[:-1], text[1:])

        return Workload(model, (text[:-1], model.initial_state(self.batch)), make_step)

    def ceiling(self, rates: Sequence[float]) -> float:
        """How many times fewer operations the step's GEMMs take at these drop rates of the three sites."""
        return flop_ceiling(self.units, self.vocabulary, [1 - rate for rate in rates])


def flop_ceiling(units: int, vocabulary: int, keeps: Sequence[float]) -> float:
    """How many times fewer GEMM operations a step takes when only `keeps` of the layers' inputs is multiplied.

    `keeps` has a share for each layer of the LSTM and one for the decoder. A layer of H units multiplies its input by
    W_ih [4H, H] and its state by W_hh [4H, H], the decoder its input by [V, H]; each in three products, forward and
    both gradients. Nothing is dropped from the states:
    ceiling = (8LHH + HV) / (4LHH + sum(keep_l)*4HH + keep*HV), for L layers.
    """
    *inputs, last = keeps
    gates, words = 4 * units * units, units * vocabulary
    dense = 2 * len(inputs) * gates + words
    return dense / (len(inputs) * gates + sum(inputs) * gates + last * words)


def cases(args: argparse.Namespace) -> list[Case]:
    """All combinations of the options."""
    chosen = product(args.units, args.vocabulary, args.batch, args.rates)
    return [Case(*case, window=args.window) for case in chosen]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dropfx bench lstm`."""
    parser.add_argument("--units", nargs="+", type=arguments.positive, default=list(UNITS), help="(650 1500)")
    parser.add_argument(
        "--vocabulary", nargs="+", type=arguments.positive, default=list(VOCABULARIES), help="(8800 10000)"
    )
    parser.add_argument("--batch", nargs="+", type=arguments.positive, default=list(BATCHES), help="(20 64)")
    parser.add_argument("--window", type=arguments.positive, default=language_model.WINDOW, help="steps of it (35)")
    steps.add_arguments(parser, "lstm", rounds=7)


@malloc.tuned
def main(args: argparse.Namespace) -> int:
    """Runs the benchmark, prints its tables and writes JSON, Markdown and a chart. Returns the exit status."""
    console = Console()
    with console.status("") as status:
        results = steps.measure_all(cases(args), args, console, status)
    steps_report.show_and_write(console, "lstm", results, args, {"paper": PAPER.text}, PAPER)
    return 0
