"""`dropfx bench perplexity`: an LSTM language model on real text, structured patterns against PyTorch's dropout."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.optim.lr_scheduler import LambdaLR

import dropfx
from dropfx.bench import arguments, fidelity, language_model, malloc, report, text
from dropfx.bench.fidelity import BERNOULLI, NONE
from dropfx.bench.language_model import LanguageModel
from dropfx.bench.text import Corpus
from dropfx.errors import InvalidOption

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VARIANTS = (NONE, BERNOULLI, "block", "row", "block@time")


@dataclass(frozen=True)
class Run:
    """One training: perplexities after each epoch, in eval mode, and seconds of training in each."""

    seed: int
    valid: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def result(self) -> float:
        """Test perplexity after the epoch of the best validation perplexity."""
        return self.test[self.valid.index(min(self.valid))]


@dataclass
class Outcome:
    """A variant's runs by seed.

    `rewritten` of the model's `sites` are drawn by dropfx (none where it is not used); `unsupported` says why dropfx
    does not take the variant, and is empty where it does.
    """

    variant: str
    rewritten: int = 0
    sites: int = 0
    unsupported: str = ""
    runs: list[Run] = field(default_factory=list)


def excess(reference: Outcome, outcome: Outcome) -> float:
    """By what share the test perplexity is above the reference's, geometric mean over the seeds that both have."""
    pairs = zip(reference.runs, outcome.runs, strict=False)
    return math.exp(statistics.mean(math.log(run.result / base.result) for base, run in pairs)) - 1


def compare(corpus: Corpus, args: argparse.Namespace, progress: Progress) -> Iterator[list[Outcome]]:
    """All variants with all seeds: after each training, what is known so far.

    Raises:
        InvalidOption: an unknown variant, or a split too short for the batch.
    """
    variants = list(dict.fromkeys([BERNOULLI, *args.variants]))
    outcomes = [_outcome(variant, len(corpus.words), args) for variant in variants]
    supported = [outcome for outcome in outcomes if not outcome.unsupported]
    task = progress.add_task("", total=args.seeds * len(supported) * args.epochs * len(corpus.train))
    for seed in range(args.seeds):
        for outcome in supported:
            progress.update(task, description=f"{outcome.variant}, seed {seed}")
            outcome.runs.append(train(outcome.variant, corpus, seed, args, partial(progress.advance, task)))
            yield outcomes


def _outcome(variant: str, words: int, args: argparse.Namespace) -> Outcome:
    options = fidelity.options_of(variant)
    if options is None:
        return Outcome(variant)
    model = LanguageModel(words, args.units, args.rate)
    window = torch.zeros(language_model.WINDOW, args.batch, dtype=torch.int64)
    try:
        sites = dropfx.explain(model, window, model.initial_state(args.batch), options=options).sites
    except InvalidOption as error:  # a pattern and groups that do not go together
        return Outcome(variant, unsupported=str(error))
    return Outcome(variant, sum(bool(site.rewritten) for site in sites), len(sites))


def train(variant: str, corpus: Corpus, seed: int, args: argparse.Namespace, advance: Callable[[int], None]) -> Run:
    """One training; the seed sets the weights, alike for every variant, and the masks.

    `advance` is told how many words of the training split have passed.
    """
    torch.manual_seed(seed)
    options = fidelity.options_of(variant)
    model = LanguageModel(len(corpus.words), args.units, 0.0 if variant == NONE else args.rate)
    if options is not None:
        dropfx.compile(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    # the full rate for some epochs, then divided anew before each one
    schedule = LambdaLR(optimizer, lambda epoch: args.decay ** -max(0, epoch + 1 - args.flat_epochs))
    text, valid, test = (language_model.columns(s, args.batch) for s in (corpus.train, corpus.valid, corpus.test))
    run = Run(seed)
    for _ in range(args.epochs):
        state, start = model.initial_state(args.batch), time.perf_counter()
        for words, targets in language_model.windows(text):
            _, state = language_model.train_step(model, optimizer, words, targets, state, args.clip)
            advance(words.numel())
        run.seconds.append(time.perf_counter() - start)
        schedule.step()
        run.valid.append(language_model.perplexity(model, valid))
        run.test.append(language_model.perplexity(model, test))
    return run


def table(outcomes: Sequence[Outcome], corpus: str) -> Table:
    """A row a variant."""
    result = Table(title=f"Perplexity against PyTorch dropout, {corpus}", box=box.SIMPLE_HEAD)
    for heading in ("dropout", "sites", "valid", "test", "against Bernoulli", "s/epoch"):
        result.add_column(heading, justify="left" if heading == "dropout" else "right")
    reference = next(outcome for outcome in outcomes if outcome.variant == BERNOULLI)
    for outcome in outcomes:
        if not outcome.runs:
            result.add_row(outcome.variant, outcome.unsupported and "unsupported")
            continue
        result.add_row(
            outcome.variant,
            f"{outcome.rewritten}/{outcome.sites}" if outcome.sites else "",
            f"{statistics.mean(min(run.valid) for run in outcome.runs):.1f}",
            f"{statistics.mean(run.result for run in outcome.runs):.1f}",
            "" if outcome is reference else f"{excess(reference, outcome):+.1%}",
            f"{statistics.median(second for run in outcome.runs for second in run.seconds):.1f}",
        )
    return result


def _draw(outcomes: Sequence[Outcome], axes: Sequence[Axes]) -> None:
    (axis,) = axes
    for outcome in outcomes:
        if outcome.runs:
            means = [statistics.mean(values) for values in zip(*(run.valid for run in outcome.runs), strict=True)]
            axis.plot(range(1, len(means) + 1), means, marker="o", markersize=3, label=outcome.variant)
    axis.set(xlabel="epoch", ylabel="validation perplexity", yscale="log")
    axis.locator_params(axis="x", integer=True)
    axis.yaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_minor_formatter("{x:.0f}")
    axis.legend(frameon=False, fontsize=8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dropfx bench perplexity`."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="a text file, one sentence per line (default: King James Bible)")
    source.add_argument("--brown", metavar="DIR", help="folder of the Brown corpus")
    parser.add_argument("--vocabulary", type=arguments.positive, default=10_000, help="most frequent words (10000)")
    parser.add_argument("--units", type=arguments.positive, default=200, help="of both layers (default: 200)")
    parser.add_argument("--rate", type=arguments.rate, default=0.5, help="drop rate (default: .5)")
    parser.add_argument("--batch", type=arguments.positive, default=20, help="columns of text (default: 20)")
    parser.add_argument("--seeds", type=arguments.positive, default=1, help="number of seeds (default: 1)")
    parser.add_argument("--epochs", type=arguments.positive, default=3, help="(default: 3)")
    parser.add_argument("--lr", type=arguments.above_zero, default=1.0, help="of SGD, in the first epochs (default: 1)")
    parser.add_argument("--flat-epochs", type=arguments.positive, default=1, help="epochs of that rate (default: 1)")
    parser.add_argument("--decay", type=arguments.above_zero, default=2.0, help="divides it before each epoch (2)")
    parser.add_argument("--clip", type=arguments.above_zero, default=5.0, help="norm of the gradient (default: 5)")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        metavar="NAME",
        help=f"none, bernoulli, a pattern; row:2 sets max_period, block@4 groups ({' '.join(VARIANTS)})",
    )
    parser.add_argument("--out", default="dropfx-bench", metavar="DIR", help="folder of perplexity.json, .md, .png")
    arguments.add_malloc(parser)


@malloc.tuned
def main(args: argparse.Namespace) -> int:
    """Trains all variants, prints the table and writes JSON, Markdown and a chart. Returns the exit status."""
    console, folder = Console(), Path(args.out)
    corpus = text.load(args.text, args.brown, args.vocabulary)
    outcomes: list[Outcome] = []
    with Progress(console=console) as progress:
        for outcomes in compare(corpus, args, progress):
            # after each training: a long run that ends early keeps what it has
            report.write_json(folder / "perplexity.json", _content(outcomes, corpus, args))
    console.print(table(outcomes, corpus.name))
    for outcome in outcomes:
        if outcome.unsupported:
            console.print(f"{outcome.variant} is unsupported: {outcome.unsupported}", highlight=False, markup=False)
    report.write_markdown(folder / "perplexity.md", table(outcomes, corpus.name))
    console.print(report.chart(folder / "perplexity.png", 1, partial(_draw, outcomes)), highlight=False)
    console.print(f"figures: {folder / 'perplexity.json'}", highlight=False)
    return 0


def _content(outcomes: Sequence[Outcome], corpus: Corpus, args: argparse.Namespace) -> dict[str, object]:
    settings = ("units", "rate", "batch", "epochs", "lr", "flat_epochs", "decay", "clip")
    sizes = {name: len(getattr(corpus, name)) for name in ("words", "train", "valid", "test")}
    reference = next(outcome for outcome in outcomes if outcome.variant == BERNOULLI)
    return {
        "text": {"name": corpus.name, **sizes},
        "settings": {name: getattr(args, name) for name in settings},
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "excess": {outcome.variant: excess(reference, outcome) for outcome in outcomes if outcome.runs},
    }
