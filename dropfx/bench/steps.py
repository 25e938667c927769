"""Training steps of eager PyTorch, torch.compile and dropfx, interleaved: what `bench mlp` and `lstm` share."""

from __future__ import annotations

import argparse
import copy
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.status import Status
from torch import nn

import dropfx
from dropfx.bench import arguments, harness, malloc
from dropfx.bench.harness import Ratio
from dropfx.planning.timing import Step

EAGER, COMPILED, DROPFX = "eager", "torch.compile", "dropfx"
RATES = (0.3, 0.5, 0.7)
_SHORT_ROUNDS = 5


@dataclass(frozen=True)
class Workload:
    """What the candidates of a case train.

    Attributes:
        model: as written; each candidate trains a copy.
        inputs: of a training call.
        make_step: makes a training step of what is called, the model or its compiled form, and the model.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    make_step: Callable[[Callable[..., Any], nn.Module], Step]


class Case(Protocol):
    """A net, its batch size and drop rate."""

    @property
    def net(self) -> str:
        """The net's sizes, for tables."""

    @property
    def batch(self) -> int:
        """Samples in a batch."""

    @property
    def rate(self) -> float:
        """Drop rate of all sites."""

    def workload(self) -> Workload:
        """The model and its step, from PyTorch's generator."""

    def ceiling(self, rates: Sequence[float]) -> float:
        """How many times fewer operations the step's GEMMs take at these drop rates of the sites, in their order."""


@dataclass
class Result:
    """A case's figures: seconds per step by round, ratio against the faster baseline, FLOP ceilings, peak bytes."""

    case: Case
    seconds: dict[str, list[float]]
    ratio: Ratio
    ceiling: float
    ceiling_drawn: float
    drawn_rates: list[float]
    rewritten: int
    draws: list[int]
    peak_bytes: dict[str, int]
    ratio_system_malloc: Ratio | None = None


def has_cpp_compiler() -> bool:
    """Whether Inductor finds the C++ compiler that it needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def measure_all(cases: Sequence[Case], args: argparse.Namespace, console: Console, status: Status) -> list[Result]:
    """All cases, with the options of `add_arguments`."""
    baselines = list(args.baselines)
    if COMPILED in baselines and not has_cpp_compiler():
        baselines.remove(COMPILED)
        console.print("torch.compile is left out: no C++ compiler (set CXX)")
    results = []
    for number, case in enumerate(cases):
        status.update(f"{number + 1}/{len(cases)}: {case.net}, batch {case.batch}, p={case.rate}")
        results.append(measure(case, options_of(args), baselines or [EAGER], args.rounds))
    if malloc.is_tuned():
        status.update("short run with the system's malloc settings")
        _add_system_ratios(results, options_of(args), min(args.rounds, _SHORT_ROUNDS))
    return results


def measure(case: Case, options: Mapping[str, Any], baselines: Sequence[str], rounds: int) -> Result:
    """Times and memory of one case; every candidate starts from the same weights and sees the same batch."""
    torch.manual_seed(0)
    work = case.workload()
    sites = dropfx.explain(work.model, *work.inputs, options=dict(options)).sites
    drawn = [float(site.drawn_rate) for site in sites]

    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    # torch.compile as its user gets it: Dynamo leaves nn.LSTM to eager unless something in the process asked otherwise
    with torch._dynamo.config.patch(allow_rnn=False):
        for name in (*baselines, DROPFX):
            model = copy.deepcopy(work.model)
            step = work.make_step(_runnable(name, model, options), model)
            step(), step()
            model.zero_grad(set_to_none=True)
            peaks[name] = harness.peak_memory(step)
            steps[name] = step
        seconds = harness.interleave(steps, rounds)
    if COMPILED in baselines:
        torch.compiler.reset()
    return Result(
        case=case,
        seconds=seconds,
        ratio=harness.ratio(seconds, DROPFX, baselines),
        ceiling=case.ceiling([case.rate] * len(drawn)),
        ceiling_drawn=case.ceiling(drawn),
        drawn_rates=drawn,
        rewritten=sum(bool(site.rewritten) for site in sites),
        draws=[site.draws for site in sites],
        peak_bytes=peaks,
    )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `dropfx.compile` that the command line gives."""
    return {"pattern": args.pattern, "groups": args.groups}


def _runnable(name: str, model: nn.Module, options: Mapping[str, Any]) -> Callable[..., Any]:
    if name == COMPILED:
        return torch.compile(model)
    return dropfx.compile(model, **options) if name == DROPFX else model


def measure_ratios(jobs: Sequence[tuple[Case, str]], options: Mapping[str, Any], rounds: int) -> list[Ratio]:
    """Each case's ratio against the one baseline named beside it."""
    return [measure(case, options, [baseline], rounds).ratio for case, baseline in jobs]


def _add_system_ratios(results: list[Result], options: Mapping[str, Any], rounds: int) -> None:
    jobs = [(result.case, result.ratio.baseline) for result in results]
    ratios = malloc.in_fresh_process(False, measure_ratios, jobs, options, rounds)
    for result, ratio in zip(results, ratios, strict=True):
        result.ratio_system_malloc = ratio


def add_arguments(
    parser: argparse.ArgumentParser,
    name: str,
    rounds: int,
    rates: Sequence[float] | None = RATES,
    baselines: Sequence[str] = (EAGER, COMPILED),
) -> None:
    """The options that the benches of training steps share; `rounds`, `rates` and `baselines` are their defaults."""
    given = "each net's own" if rates is None else " ".join(f"{rate:g}" for rate in rates)
    parser.add_argument("--rates", nargs="+", type=arguments.rate, default=rates, help=f"drop rates (default: {given})")
    parser.add_argument(
        "--rounds", type=arguments.positive, default=rounds, help=f"rounds of turns (default: {rounds})"
    )
    parser.add_argument("--pattern", default="block", help="pattern of dropfx.compile (default: block)")
    parser.add_argument(
        "--groups", type=arguments.groups, default="auto", help="draws a batch, time or auto (default: auto)"
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=(EAGER, COMPILED),
        default=list(baselines),
        help=f"what dropfx is compared with (default: {' '.join(baselines)})",
    )
    parser.add_argument("--out", default="dropfx-bench", metavar="DIR", help=f"folder of {name}.json, .md, .png")
    arguments.add_malloc(parser)
