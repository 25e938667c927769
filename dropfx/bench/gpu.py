"""`dropfx bench gpu`: gathered products and MLP steps on a GPU, against cuBLAS, eager PyTorch and torch.compile."""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dropfx
from dropfx.bench import arguments, report
from dropfx.bench.harness import Ratio, quartiles
from dropfx.bench.mlp import flop_ceiling
from dropfx.bench.training import mlp
from dropfx.errors import InvalidOption

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOWERINGS = ("aten", "triton")
SIZES = (4096, 8192)
RATES = (0.3, 0.5, 0.7)
BLOCK = 64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_COPIES = 4
"""Inputs take turns, so that no product finds its own in L2."""


@dataclass
class Result:
    """One row: median seconds of each contender, and the ratio of the fastest baseline to each lowering."""

    what: str
    rate: float
    limit: float
    seconds: dict[str, float]
    ratios: dict[str, Ratio]


def rounds_of(steps: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds a step of each contender, in turns; by CUDA events on a GPU, by the clock elsewhere."""
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(_seconds(steps[name], device))
    return times


def _seconds(step: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _result(what: str, rate: float, limit: float, times: dict[str, list[float]]) -> Result:
    baselines = [name for name in times if name not in LOWERINGS]
    fastest = min(baselines, key=lambda name: statistics.median(times[name]))
    ratios = {}
    for name in LOWERINGS:
        low, median, high = quartiles([a / b for a, b in zip(times[fastest], times[name], strict=True)])
        ratios[name] = Ratio(fastest, median, low, high)
    return Result(what, rate, limit, {name: statistics.median(found) for name, found in times.items()}, ratios)


class _Product(NamedTuple):
    """One of a Linear's products: which gradient (None: the forward), and the full product it is measured against."""

    what: str
    compact_rows: bool
    mask: list[bool] | None
    dense: Callable[[Tensor, Tensor, Tensor], Tensor]


PRODUCTS = (
    _Product("forward", False, None, lambda x, w, dy: x @ w.t()),
    _Product("input gradient", False, [True, False, False], lambda x, w, dy: dy @ w),
    _Product("weight gradient", False, [False, True, False], lambda x, w, dy: dy.t() @ x),
    _Product("both sides compact", True, None, lambda x, w, dy: x @ w.t()),
)


def products(size: int, rate: float, dtype: torch.dtype, device: str, rounds: int) -> Iterator[Result]:
    """Forward, both gradients, and both sides compact, of one Linear with M = N = K = size."""
    importlib.import_module("dropfx.ops.by_kernels")  # registers the ops of Triton

    block = min(BLOCK, size // 4)
    count = round((1 - rate) * (size // block))
    starts = torch.randperm(size // block, device=device)[:count].sort().values * block
    shapes = (size, size), (size, size), (size, size), (size, count * block)
    inputs = [[torch.randn(*shape, dtype=dtype, device=device) for shape in shapes] for _ in range(_COPIES)]
    for product in PRODUCTS:
        times = rounds_of(_contenders(product, inputs, starts, block), rounds, device)
        limit = (size / (count * block)) ** (2 if product.compact_rows else 1)
        yield _result(f"{product.what}, {size}", rate, limit, times)


def _contenders(
    product: _Product, inputs: list[list[Tensor]], starts: Tensor, block: int
) -> dict[str, Callable[[], object]]:
    runs = starts if product.compact_rows else None, block, starts, block
    found: dict[str, Callable[[], object]] = {}

    def dense() -> object:
        x, w, dy, _ = next(turns["cuBLAS"])
        return product.dense(x, w, dy)

    def gathered(name: str) -> object:
        _, w, dy, kept = next(turns[name])
        ops, twin = torch.ops.dropfx, "_triton" if name == "triton" else ""
        if product.mask is None:
            return getattr(ops, f"linear{twin}").default(kept, w, None, *runs, 1.0)
        return getattr(ops, f"linear_backward{twin}").default(dy, kept, w, *runs, 1.0, product.mask)

    turns = {name: itertools.cycle(inputs) for name in ("cuBLAS", *LOWERINGS)}
    found["cuBLAS"] = dense
    found.update({name: partial(gathered, name) for name in LOWERINGS})
    return found


def steps(sizes: tuple[int, ...], batch: int, rate: float, dtype: torch.dtype, device: str, rounds: int) -> Result:
    """Forward and backward of an MLP: eager, torch.compile and dropfx by both lowerings."""
    torch.manual_seed(0)
    written = mlp(sizes, rate).to(device=device, dtype=dtype)
    x = torch.randn(batch, sizes[0], dtype=dtype, device=device)

    def step(model: Callable[[Tensor], Tensor], written: nn.Module) -> None:
        written.zero_grad(set_to_none=True)
        torch.autograd.backward(model(x).sum())

    contenders: dict[str, Callable[[], object]] = {}
    for name in ("eager", "torch.compile", *LOWERINGS):
        model = copy.deepcopy(written)
        runnable: Callable[[Tensor], Tensor] = model
        if name == "torch.compile":
            runnable = torch.compile(model, backend="inductor" if device == "cuda" else "eager")
        elif name in LOWERINGS:
            runnable = dropfx.compile(model, lowering=name, min_speedup=0)
        contenders[name] = partial(step, runnable, model)
    drawn = [1 - site.drawn_rate for site in dropfx.explain(written, x, options={"min_speedup": 0}).sites]
    what = f"{'-'.join(map(str, sizes))}, batch {batch}, forward + backward"
    return _result(what, rate, flop_ceiling(sizes, drawn), rounds_of(contenders, rounds, device))


def table(results: list[Result]) -> Table:
    """A row a case: milliseconds of each contender, ratios to the fastest baseline."""
    made = Table(title="Gathered products on the device")
    for heading in ("what", "p", "baseline", "ms", *(f"{name} ms" for name in LOWERINGS), *LOWERINGS, "limit"):
        made.add_column(heading, justify="left" if heading in ("what", "baseline") else "right")
    for result in results:
        baseline = result.ratios["aten"].baseline
        made.add_row(
            result.what,
            f"{result.rate:g}",
            baseline,
            f"{1000 * result.seconds[baseline]:.3f}",
            *(f"{1000 * result.seconds[name]:.3f}" for name in LOWERINGS),
            *(f"{result.ratios[name].median:.2f}x" for name in LOWERINGS),
            f"{result.limit:.2f}",
        )
    return made


def _draw(results: list[Result], axes: Sequence[Axes]) -> None:
    for place, name in enumerate(LOWERINGS):
        rows = [index + 0.4 * place for index in range(len(results))]
        axes[0].bar(rows, [result.ratios[name].median for result in results], width=0.4, label=name)
    axes[0].plot(range(len(results)), [result.limit for result in results], "k_", label="limit")
    names = [f"{result.what.partition(', forward')[0]}, p={result.rate:g}" for result in results]
    axes[0].set_xticks(range(len(results)), names, rotation=90, fontsize=6)
    axes[0].set_ylabel("times faster")
    axes[0].legend()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dropfx bench gpu`."""
    parser.add_argument("--sizes", nargs="+", type=arguments.positive, default=SIZES, help="M = N = K (4096 8192)")
    parser.add_argument("--rates", nargs="+", type=arguments.rate, default=RATES, help="drop rates (.3 .5 .7)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(bfloat16)")
    parser.add_argument("--rounds", type=arguments.positive, default=21, help="rounds of turns (default: 21)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: Triton's interpreter, a trial")
    parser.add_argument("--out", default="dropfx-bench", metavar="DIR", help="folder of gpu.json, .md, .png")


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark, prints its table and writes JSON, Markdown and a chart. Returns the exit status.

    Raises:
        InvalidOption: there is no GPU.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InvalidOption("device: got 'cuda', but PyTorch sees no GPU here; accepted is 'cpu', for a trial only")
    console, dtype = Console(), DTYPES[args.dtype]
    results: list[Result] = []
    with console.status("") as status:
        for size in args.sizes:
            for rate in args.rates:
                status.update(f"{size}, p={rate}")
                results += products(size, rate, dtype, args.device, args.rounds)
                results.append(steps((size,) * 4, size, rate, dtype, args.device, args.rounds))
    console.print(table(results))
    folder = Path(args.out)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "none"
    content = {"gpu": gpu, "cuda": torch.version.cuda, "dtype": args.dtype, "cases": [asdict(r) for r in results]}
    report.write_json(folder / "gpu.json", content)
    report.write_markdown(folder / "gpu.md", table(results))
    console.print(report.chart(folder / "gpu.png", 1, partial(_draw, results), width=9), highlight=False)
    console.print(f"figures: {folder / 'gpu.json'}", highlight=False)
    return 0
