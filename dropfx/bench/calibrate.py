"""Measure what work costs on this machine, for the predictions that decide what is rewritten."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import dropfx
from dropfx.bench import harness
from dropfx.bench.training import mlp
from dropfx.errors import DropfxError
from dropfx.graph.device_costs import DEVICES, DeviceCosts, keep
from dropfx.ops.products import scaled_mm
from dropfx.planning.timing import Step, seconds

_REPEATS = 9
_SMALL = (32, 32, 32, 32)
"""Widths of a perceptron whose arithmetic takes no time beside its calls."""
_LAUNCHES = 16
"""Operations that the table counts in a step of it: 8 products, 2 activations, 2 dropouts of 2, and 2 of the sum."""


def main(args: argparse.Namespace) -> int:
    """Measure, keep and show."""
    costs = calibrate()
    try:
        path = keep(torch.device("cpu"), costs)
    except OSError as error:
        raise DropfxError(f"calibrate: the costs cannot be kept: {error}") from error
    console = Console()
    console.print(_table(costs))
    console.print(f"kept in {path}; delete it to plan by the table again", soft_wrap=True, highlight=False)
    return 0


def calibrate() -> DeviceCosts:
    """The costs of this machine's CPU, with as many threads as PyTorch uses now."""
    with torch.random.fork_rng(devices=[]):
        written, compiled, draw = _small_steps()
        return DeviceCosts(
            flops={4: _flops(torch.float32), 8: _flops(torch.float64), 2: _flops(torch.bfloat16)},
            bytes=_bytes(),
            random=_random(),
            launch=written / _LAUNCHES,
            gathered=max((compiled - written - 2 * draw) / 3, written / _LAUNCHES),
            draw=draw,
            packed=_packed(),
            fused=DEVICES["cpu"].fused,
        )


def _median(step: Step, count: int = 1) -> float:
    step()
    return statistics.median(seconds(step, count) / count for _ in range(_REPEATS))


def _flops(dtype: torch.dtype, size: int = 1024) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _median(lambda: torch.mm(a, b, out=out))


def _packed(rows: int = 256, size: int = 1024) -> float:
    """Of products that `ops.products` gives to oneDNN; 1 where they are no faster."""
    a, b = torch.randn(rows, size), torch.randn(size, size)
    return max(_median(lambda: torch.mm(a, b)) / _median(lambda: scaled_mm(a, b, 1.0)), 1.0)


def _bytes(size: int = 2**24) -> float:
    source = torch.zeros(size)
    out = torch.empty_like(source)
    return 2 * size * source.element_size() / _median(lambda: out.copy_(source))


def _random(size: int = 2**21) -> float:
    out = torch.empty(size)
    return size / _median(lambda: out.bernoulli_(0.5))


def _small_steps() -> tuple[float, float, float]:
    """Seconds of a step of the small perceptron as written, of one with all rewritten, and of a site's draw."""
    written = mlp(_SMALL, 0.5)
    compiled, x = dropfx.compile(copy.deepcopy(written), min_speedup=0), torch.randn(16, _SMALL[0])

    def step(model: nn.Module) -> Step:
        """Forward and backward."""
        return lambda: torch.autograd.backward(model(x).sum())

    times = harness.interleave({"written": step(written), "compiled": step(compiled)}, _REPEATS, turn_seconds=0.05)
    (graph,) = compiled.__dict__["_dropfx"].capture.graphs
    draws = _median(graph.variants[0].draw, 50)
    return statistics.median(times["written"]), statistics.median(times["compiled"]), max(draws / 2, 1e-7)


_SHOWN: dict[str, tuple[str, Callable[[DeviceCosts], float]]] = {
    "products, float32": ("GFLOP/s", lambda costs: costs.flops[4] / 1e9),
    "products, float64": ("GFLOP/s", lambda costs: costs.flops[8] / 1e9),
    "products, bfloat16": ("GFLOP/s", lambda costs: costs.flops[2] / 1e9),
    "products by oneDNN, more": ("times", lambda costs: costs.packed),
    "memory": ("GB/s", lambda costs: costs.bytes / 1e9),
    "random numbers": ("million/s", lambda costs: costs.random / 1e6),
    "an operation": ("us", lambda costs: costs.launch * 1e6),
    "a gathered operation, more": ("us", lambda costs: costs.gathered * 1e6),
    "a site's draw": ("us", lambda costs: costs.draw * 1e6),
}


def _table(costs: DeviceCosts) -> Table:
    table = Table("", "unit", "table", "measured")
    for name, (unit, figure) in _SHOWN.items():
        table.add_row(name, unit, f"{figure(DEVICES['cpu']):.3g}", f"{figure(costs):.3g}")
    return table
