"""`dropfx bench mlp`: whole training steps of eager PyTorch, torch.compile and dropfx, interleaved in one run."""

from __future__ import annotations

import argparse
import copy
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import dropfx
from dropfx.bench import arguments, harness, malloc, mlp_report, overhead, report
from dropfx.bench.harness import Ratio
from dropfx.bench.training import mlp, sgd, train_step
from dropfx.timing import Step

EAGER, COMPILED, DROPFX = "eager", "torch.compile", "dropfx"
NETS = ((784, 2048, 2048, 10), (784, 4096, 4096, 10))
BATCHES = (128, 1024)
RATES = (0.3, 0.5, 0.7)
_SHORT_ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """One net (layer sizes), batch size and drop rate."""

    sizes: tuple[int, ...]
    batch: int
    rate: float

    @property
    def net(self) -> str:
        return "-".join(map(str, self.sizes))


@dataclass
class Result:
    """A case's figures: seconds a step by round, ratio against the faster baseline, FLOP ceilings, peak bytes."""

    case: Case
    seconds: dict[str, list[float]]
    ratio: Ratio
    ceiling: float
    ceiling_drawn: float
    drawn_rates: list[float]
    rewritten: int
    peak_bytes: dict[str, int]
    ratio_system_malloc: Ratio | None = None


def flop_ceiling(sizes: Sequence[int], keeps: Sequence[float], input_gradient: bool = False) -> float:
    """How many times fewer GEMM operations a step takes when only `keeps` of each hidden layer is computed.

    A Linear of n inputs and m outputs takes 2*batch*n*m operations in each of three products: forward, weight
    gradient, input gradient; the first layer needs no input gradient unless asked for. Kept shares multiply n and m:
    ceiling = sum(w*n*m) / sum(w*n*m*keep_in*keep_out), w = 2 for the first layer, else 3.
    """
    shares = [1.0, *keeps, 1.0]
    weights = [3 if input_gradient else 2] + [3] * (len(sizes) - 2)
    dense = [w * n * m for w, (n, m) in zip(weights, pairwise(sizes), strict=True)]
    compact = [work * a * b for work, (a, b) in zip(dense, pairwise(shares), strict=True)]
    return sum(dense) / sum(compact)


def cases(
    nets: Sequence[tuple[int, ...]] | None, batches: Sequence[int] | None, rates: Sequence[float] | None
) -> list[Case]:
    """All combinations; where neither nets nor batches are named, the large net only at the large batch."""
    pairs = list(product(nets or NETS, batches or BATCHES))
    if nets is None and batches is None:
        pairs.remove((NETS[1], BATCHES[0]))
    return [Case(sizes, batch, rate) for (sizes, batch), rate in product(pairs, rates or RATES)]


def has_cpp_compiler() -> bool:
    """Whether Inductor finds the C++ compiler that it needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def measure(case: Case, pattern: str, baselines: Sequence[str], rounds: int) -> Result:
    """Times and memory of one case; every contender starts from the same weights and sees the same batch."""
    torch.manual_seed(0)
    dense = mlp(case.sizes, case.rate)
    images = torch.randn(case.batch, case.sizes[0])
    labels = torch.randint(case.sizes[-1], (case.batch,))
    sites = dropfx.explain(dense, images, options={"pattern": pattern}).sites
    drawn = [float(site.drawn_rate) for site in sites]

    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    for name in (*baselines, DROPFX):
        step, rest = _contender(name, copy.deepcopy(dense), pattern, images, labels)
        step(), step()
        rest()
        peaks[name] = harness.peak_memory(step)
        steps[name] = step
    seconds = harness.interleave(steps, rounds)
    if COMPILED in baselines:
        torch.compiler.reset()
    return Result(
        case=case,
        seconds=seconds,
        ratio=harness.ratio(seconds, DROPFX, baselines),
        ceiling=flop_ceiling(case.sizes, [1 - case.rate] * len(drawn)),
        ceiling_drawn=flop_ceiling(case.sizes, [1 - rate for rate in drawn]),
        drawn_rates=drawn,
        rewritten=sum(bool(site.rewritten) for site in sites),
        peak_bytes=peaks,
    )


def _contender(
    name: str, model: nn.Module, pattern: str, images: torch.Tensor, labels: torch.Tensor
) -> tuple[Step, Callable[[], None]]:
    """A training step, and what brings the model to rest (no gradients)."""
    optimizer = sgd(model)
    runnable: Callable[[torch.Tensor], torch.Tensor] = model
    if name == COMPILED:
        runnable = torch.compile(model)
    elif name == DROPFX:
        runnable = dropfx.compile(model, pattern=pattern)
    return (
        lambda: train_step(runnable, optimizer, images, labels),
        lambda: optimizer.zero_grad(set_to_none=True),
    )


def measure_ratios(jobs: Sequence[tuple[Case, str]], pattern: str, rounds: int) -> list[Ratio]:
    """Each case's ratio against the one baseline named beside it."""
    return [measure(case, pattern, [baseline], rounds).ratio for case, baseline in jobs]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dropfx bench mlp`."""
    parser.add_argument("--nets", nargs="+", type=arguments.net, metavar="SIZES", help="such as 784-2048-2048-10")
    parser.add_argument("--batch", nargs="+", type=arguments.positive, help="batch sizes (default: 128 1024)")
    parser.add_argument("--rates", nargs="+", type=arguments.rate, help="drop rates (default: .3 .5 .7)")
    parser.add_argument("--rounds", type=arguments.positive, default=15, help="rounds of turns (default: 15)")
    parser.add_argument("--pattern", default="block", help="pattern of dropfx.compile (default: block)")
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=(EAGER, COMPILED),
        default=[EAGER, COMPILED],
        help="what dropfx is compared with (default: both)",
    )
    parser.add_argument("--out", default="dropfx-bench", metavar="DIR", help="folder of mlp.json, .md, .png")
    arguments.add_malloc(parser)


@malloc.tuned
def main(args: argparse.Namespace) -> int:
    """Runs the benchmark, prints its tables and writes JSON, Markdown and a chart. Returns the exit status."""
    console = Console()
    baselines = list(args.baselines)
    if COMPILED in baselines and not has_cpp_compiler():
        baselines.remove(COMPILED)
        console.print("torch.compile is left out: no C++ compiler (set CXX)")
    results = []
    todo = cases(args.nets, args.batch, args.rates)
    with console.status("") as status:
        for number, case in enumerate(todo):
            status.update(f"{number + 1}/{len(todo)}: {case.net}, batch {case.batch}, p={case.rate}")
            results.append(measure(case, args.pattern, baselines or [EAGER], args.rounds))
        if malloc.is_tuned():
            status.update("short run with the system's malloc settings")
            _add_system_ratios(results, args.pattern, min(args.rounds, _SHORT_ROUNDS))
        status.update("wrapper overhead")
        extra = overhead.measure()
    mlp_report.show(console, results)
    overhead.show(console, extra)
    folder = Path(args.out)
    content = {"pattern": args.pattern, "cases": [asdict(result) for result in results], "overhead": asdict(extra)}
    report.write_json(folder / "mlp.json", content)
    mlp_report.write(folder, results)
    console.print(report.chart(folder / "mlp.png", *mlp_report.panels(results)), highlight=False)
    console.print(f"figures: {folder / 'mlp.json'}", highlight=False)
    return 0


def _add_system_ratios(results: list[Result], pattern: str, rounds: int) -> None:
    jobs = [(result.case, result.ratio.baseline) for result in results]
    ratios = malloc.in_fresh_process(False, measure_ratios, jobs, pattern, rounds)
    for result, ratio in zip(results, ratios, strict=True):
        result.ratio_system_malloc = ratio
