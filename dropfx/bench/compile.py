"""`dropfx bench compile`: training steps and compile times of torch.compile with Inductor and with backend="dropfx"."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import dropfx
from dropfx.bench import arguments, compile_report, harness, malloc, models, report
from dropfx.bench.harness import Ratio
from dropfx.bench.models import Built, Case
from dropfx.bench.steps import has_cpp_compiler
from dropfx.bench.training import sgd
from dropfx.errors import InvalidOption
from dropfx.planning.timing import Step

EAGER, COMPILED, DROPFX, BACKEND = "eager", "torch.compile", "dropfx.compile", "backend"


@dataclass
class Result:
    """A case's figures.

    Attributes:
        name, rate: the case.
        seconds: of a training step, by candidate and round.
        ratios: how many times faster than each other candidate the backend is.
        sites, rewritten: dropouts with a rate, and how many of them are rewritten by default.
        ceiling: matrix FLOPs of a step, as written over what the rewritten model computes: what they predict.
        first_steps: seconds until the end of the first step, by candidate and run; empty where not measured.
        compile_ratio: those of the backend over those of torch.compile, paired by run: median and quartiles.
    """

    name: str
    rate: float
    seconds: dict[str, list[float]]
    ratios: dict[str, Ratio]
    sites: int
    rewritten: int
    ceiling: float
    first_steps: dict[str, list[float]]
    compile_ratio: Ratio | None = None


def candidate(name: str, built: Built, inner: str) -> Step:
    """A whole training step: forward, loss, backward, SGD with momentum; no gradients at rest."""
    model, optimizer = built.model, sgd(built.model)
    runnable: Callable[..., Any] = model
    if name == COMPILED:
        runnable = torch.compile(model, backend=inner)
    elif name == BACKEND:
        runnable = torch.compile(model, backend="dropfx", options={"inner": inner})
    elif name == DROPFX:
        runnable = dropfx.compile(model)

    def step() -> None:
        """Forward and loss, backward, update; gradients are released."""
        torch.autograd.backward(built.loss(runnable(*built.args, **built.kwargs)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(case: Case, inner: str, rounds: int, compile_runs: int) -> Result:
    """Times of one case; every candidate starts from the same weights and sees the same batch."""
    first_steps = _first_steps(case, inner, compile_runs if case.times_compilation else 0)
    built = case.make()
    explained = dropfx.explain(built.model, *built.args, kwargs=built.kwargs)
    total = _flops(built)
    steps = {name: candidate(name, built.copy(), inner) for name in (EAGER, COMPILED, DROPFX, BACKEND)}
    seconds = harness.interleave(steps, rounds)
    torch.compiler.reset()
    sites = [site for site in explained.sites if site.rate > 0]
    return Result(
        name=case.name,
        rate=case.rate,
        seconds=seconds,
        ratios={name: harness.ratio(seconds, BACKEND, [name]) for name in (EAGER, COMPILED, DROPFX)},
        sites=len(sites),
        rewritten=sum(bool(site.rewritten) for site in sites),
        ceiling=total / (total - explained.flops_dense + explained.flops_compact),
        first_steps=first_steps,
        # the seconds of the backend over those of torch.compile
        compile_ratio=harness.ratio(first_steps, COMPILED, [BACKEND]) if first_steps else None,
    )


def _flops(built: Built) -> int:
    """FLOPs of all matrix products, convolutions and attentions of a step as written."""
    model = built.copy().model
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(built.loss(model(*built.args, **built.kwargs)))
    return int(counter.get_total_flops())


def _first_steps(case: Case, inner: str, runs: int) -> dict[str, list[float]]:
    """Seconds until the end of the first step, each in a fresh process; who begins alternates from run to run."""
    seconds: dict[str, list[float]] = {}
    for run in range(runs):
        for name in (COMPILED, BACKEND) if run % 2 == 0 else (BACKEND, COMPILED):
            taken = malloc.in_fresh_process(malloc.is_tuned(), first_step, case, name, inner)
            seconds.setdefault(name, []).append(taken)
    return seconds


def first_step(case: Case, name: str, inner: str) -> float:
    """Seconds from `torch.compile` to the end of the first training step, with nothing in any cache.

    To be called in a fresh process: it sets where compilers keep what they make. Neither candidate's imports count.
    """
    import torch._functorch.config
    import torch._inductor.config

    import dropfx.frontend.dynamo_backend  # noqa: F401

    built = case.make()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        start = time.perf_counter()
        candidate(name, built, inner)()
        return time.perf_counter() - start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dropfx bench compile`."""
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help="such as 'mlp-*' bert-0.1 (default: all)")
    parser.add_argument("--rounds", type=arguments.positive, default=11, help="rounds of turns (default: 11)")
    parser.add_argument(
        "--compile-runs", type=arguments.natural, default=3, help="first steps in fresh processes (default: 3; 0: none)"
    )
    parser.add_argument(
        "--inner",
        choices=("inductor", "aot_eager"),
        default="inductor",
        help="what both compile with; aot_eager: a trial without a C++ compiler (default: inductor)",
    )
    parser.add_argument("--out", default="dropfx-bench", metavar="DIR", help="folder of compile.json, .md, .png")
    arguments.add_malloc(parser)


@malloc.tuned
def main(args: argparse.Namespace) -> int:
    """Runs the benchmark, prints its tables and writes JSON, Markdown and a chart. Returns the exit status.

    Raises:
        InvalidOption: `--cases` matches none, or Inductor is asked for without a C++ compiler.
    """
    console = Console()
    if args.inner == "inductor" and not has_cpp_compiler():
        raise InvalidOption("inner: got 'inductor', which finds no C++ compiler (set CXX); accepted is 'aot_eager'")
    todo, missing = models.available(models.chosen(args.cases))
    for package, titles in missing.items():
        console.print(f"left out, {package} is not installed (extra `models`): {', '.join(titles)}", highlight=False)
    folder, results = Path(args.out), list[Result]()
    with console.status("") as status, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of other people's models
        for number, case in enumerate(todo):
            status.update(f"{number + 1}/{len(todo)}: {case.title}")
            results.append(measure(case, args.inner, args.rounds, args.compile_runs))
            write(folder, args.inner, results, missing)
    if not results:
        return 0
    compile_report.show(console, results)
    console.print(report.chart(folder / "compile.png", 1, partial(compile_report.draw, results), 9), highlight=False)
    console.print(f"figures: {folder / 'compile.json'}", highlight=False)
    return 0


def write(folder: Path, inner: str, results: Sequence[Result], missing: dict[str, list[str]]) -> None:
    """The figures so far."""
    cases = [asdict(result) for result in results]
    report.write_json(folder / "compile.json", {"inner": inner, "left_out": missing, "cases": cases})
    report.write_markdown(folder / "compile.md", *compile_report.tables(results))
