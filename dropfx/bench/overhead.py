"""What a compiled model costs beside its arithmetic: guards, draws, and dispatch of the gathered ops."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass

import torch
from rich.console import Console

import dropfx
from dropfx.bench import harness
from dropfx.bench.training import mlp
from dropfx.planning.timing import Step

_SIZES = (8, 8, 8, 8)
_CALLS = 100


@dataclass(frozen=True)
class Overhead:
    """Median microseconds per forward call of a 3-layer MLP of 8 units; its arithmetic is negligible.

    Attributes:
        guards: finding the graph: Dynamo's guards, measured as the same call through PyTorch's own compiler, which runs
            the model's graph as it is.
        draws: the draws of all sites.
        plain, compiled: whole calls in training.
        plain_eval, compiled_eval: whole calls in eval.
    """

    guards: float
    draws: float
    plain: float
    compiled: float
    plain_eval: float
    compiled_eval: float

    @property
    def wrapper(self) -> float:
        """What a call pays before the rewritten graph runs."""
        return self.guards + self.draws


def measure(rounds: int = 20) -> Overhead:
    """Times the compiled MLP, all sites rewritten, against the same uncompiled model, in training and in eval mode."""
    torch.manual_seed(0)
    plain = mlp(_SIZES, 0.5)
    compiled = dropfx.compile(copy.deepcopy(plain), min_speedup=0)
    inputs = torch.randn(4, _SIZES[0])
    captured = torch.compile(copy.deepcopy(plain), backend="eager")
    compiled(inputs), captured(inputs)
    (graph,) = compiled.__dict__["_dropfx"].capture.graphs
    singly: dict[str, Step] = {
        "captured": lambda: captured(inputs),
        "draws": graph.variants[0].draw,
        "plain": lambda: plain(inputs),
    }
    through, draws, alone = _microseconds(singly, rounds)
    parts = through - alone, draws
    calls: dict[str, Step] = {"plain": lambda: plain(inputs), "compiled": lambda: compiled(inputs)}
    training = _microseconds(calls, rounds)
    plain.eval()
    compiled.eval()
    return Overhead(*parts, *training, *_microseconds(calls, rounds))


def _microseconds(calls: dict[str, Step], rounds: int) -> list[float]:
    """Median microseconds per call of each, in order."""

    def repeated(call: Step) -> Step:
        """The call, as often as it takes to be timed."""
        return lambda: [call() for _ in range(_CALLS)]

    times = harness.interleave({name: repeated(call) for name, call in calls.items()}, rounds, turn_seconds=0)
    return [statistics.median(times[name]) / _CALLS * 1e6 for name in calls]


def show(console: Console, overhead: Overhead) -> None:
    """One line: microseconds that a call of the compiled model takes more, and where they go."""
    dispatch = overhead.compiled - overhead.plain - overhead.wrapper
    console.print(
        f"per training call of a 3-layer MLP of 8 units: {overhead.plain:.0f} us plain, {overhead.compiled:.0f} us "
        f"compiled: {overhead.wrapper:.0f} us wrapper (guards {overhead.guards:.0f}, draws {overhead.draws:.0f}), "
        f"{dispatch:.0f} us more for the dispatch of the gathered ops; "
        f"eval {overhead.plain_eval:.0f} us plain, {overhead.compiled_eval:.0f} us compiled",
        highlight=False,
    )
