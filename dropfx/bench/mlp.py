"""`dropfx bench mlp`: whole training steps of eager PyTorch, torch.compile and dropfx, interleaved in one run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dropfx.bench import arguments, malloc, overhead, steps, steps_report
from dropfx.bench.steps import Workload
from dropfx.bench.training import mlp, sgd, train_step
from dropfx.planning.timing import Step

NETS = ((784, 2048, 2048, 10), (784, 4096, 4096, 10))
BATCHES = (128, 1024)


@dataclass(frozen=True)
class Case:
    """One net (layer sizes), batch size and drop rate."""

    sizes: tuple[int, ...]
    batch: int
    rate: float

    @property
    def net(self) -> str:
        """Layer sizes, input first, for tables."""
        return "-".join(map(str, self.sizes))

    def workload(self) -> Workload:
        """The MLP, and its step on random images [batch, sizes[0]] with random labels."""
        model = mlp(self.sizes, self.rate)
        images = torch.randn(self.batch, self.sizes[0])
        labels = torch.randint(self.sizes[-1], (self.batch,))

        def make_step(runnable: Callable[..., Any], model: nn.Module) -> Step:
            """A step on the same batch, by SGD with momentum."""
            return partial(train_step, runnable, sgd(model), images, labels)

        return Workload(model, (images,), make_step)

    def ceiling(self, rates: Sequence[float]) -> float:
        """How many times fewer operations the step's GEMMs take at these drop rates of the hidden layers."""
        return flop_ceiling(self.sizes, [1 - rate for rate in rates])


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


def cases(nets: Sequence[tuple[int, ...]] | None, batches: Sequence[int] | None, rates: Sequence[float]) -> list[Case]:
    """All combinations; where neither nets nor batches are named, the large net only at the large batch."""
    pairs = list(product(nets or NETS, batches or BATCHES))
    if nets is None and batches is None:
        pairs.remove((NETS[1], BATCHES[0]))
    return [Case(sizes, batch, rate) for (sizes, batch), rate in product(pairs, rates)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dropfx bench mlp`."""
    parser.add_argument("--nets", nargs="+", type=arguments.net, metavar="SIZES", help="such as 784-2048-2048-10")
    parser.add_argument("--batch", nargs="+", type=arguments.positive, help="batch sizes (default: 128 1024)")
    steps.add_arguments(parser, "mlp", rounds=15)


@malloc.tuned
def main(args: argparse.Namespace) -> int:
    """Runs the benchmark, prints its tables and writes JSON, Markdown and a chart. Returns the exit status."""
    console = Console()
    with console.status("") as status:
        results = steps.measure_all(cases(args.nets, args.batch, args.rates), args, console, status)
        status.update("wrapper overhead")
        extra = overhead.measure()
    steps_report.show_and_write(console, "mlp", results, args, {"overhead": asdict(extra)})
    overhead.show(console, extra)
    return 0
