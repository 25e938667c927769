"""What a compiled model costs beside its arithmetic: key check, draws, dispatch of the gathered ops."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass

import torch
from rich.console import Console

import dropfx
from dropfx.bench import harness
from dropfx.bench.training import mlp

_SIZES = (8, 8, 8, 8)
_CALLS = 100


@dataclass(frozen=True)
class Overhead:
    """Median microseconds a forward call of a 3-layer MLP of 8 units; its arithmetic is negligible."""

    plain: float
    compiled: float
    plain_eval: float
    compiled_eval: float


def measure(rounds: int = 20) -> Overhead:
    """Times the compiled MLP, all sites rewritten, against the same uncompiled model, in training and in eval mode."""
    torch.manual_seed(0)
    plain = mlp(_SIZES, 0.5)
    compiled = dropfx.compile(copy.deepcopy(plain), min_speedup=0)
    training = _per_call(plain, compiled, rounds)
    plain.eval()
    compiled.eval()
    return Overhead(*training, *_per_call(plain, compiled, rounds))


def _per_call(plain: torch.nn.Module, compiled: torch.nn.Module, rounds: int) -> tuple[float, float]:
    inputs = torch.randn(4, _SIZES[0])

    def calls(model: torch.nn.Module) -> None:
        for _ in range(_CALLS):
            model(inputs)

    steps: dict[str, harness.Step] = {"plain": lambda: calls(plain), "compiled": lambda: calls(compiled)}
    times = harness.interleave(steps, rounds, turn_seconds=0)
    plain_time, compiled_time = (statistics.median(times[name]) / _CALLS * 1e6 for name in ("plain", "compiled"))
    return plain_time, compiled_time


def show(console: Console, overhead: Overhead) -> None:
    """One line: microseconds that a call of the compiled model takes more."""
    console.print(
        f"per call of a 3-layer MLP of 8 units: training {overhead.plain:.0f} us plain, {overhead.compiled:.0f} us "
        f"compiled (key check, draws, op dispatch); eval {overhead.plain_eval:.0f} us plain, "
        f"{overhead.compiled_eval:.0f} us compiled",
        highlight=False,
    )
