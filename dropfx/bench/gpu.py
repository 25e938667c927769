"""`dropfx bench gpu`: gathered products and MLP steps on a GPU, against cuBLAS, eager PyTorch and torch.compile."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from dropfx.bench import arguments, gpu_cases, report
from dropfx.bench.gpu_cases import LOWERINGS, Bench, Result
from dropfx.errors import InvalidOption

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = (4096, 8192)
RATES = (0.3, 0.5, 0.7)
NET, BATCHES = (784, 2048, 2048, 10), (128, 1024)
CLASSIFIER, CLASSIFIER_BATCH = (25088, 4096, 4096, 1000), 256
"""VGG16's: the features before it ask for its input's gradient."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def results_of(bench: Bench, args: argparse.Namespace) -> Iterator[Result]:
    """Every row, in the order of the table."""
    for size in args.sizes:
        for rate in args.rates:
            yield from gpu_cases.products(bench, size, rate)
            yield gpu_cases.groups(bench, size, rate)
            yield gpu_cases.steps(bench, (size,) * 4, size, rate)
    for rate in args.rates:
        for batch in args.batch:
            yield gpu_cases.graphs(bench, args.net, batch, rate)
        yield gpu_cases.steps(bench, args.classifier, args.classifier_batch, rate, input_gradient=True)


def table(results: list[Result]) -> Table:
    """A row a case: milliseconds of each candidate, ratios to the fastest baseline, peak memory against the least."""
    made = Table(title="Gathered products on the device")
    times = [f"{name} ms" for name in LOWERINGS]
    for heading in ("what", "p", "baseline", "ms", *times, *LOWERINGS, "limit", "memory"):
        made.add_column(heading, justify="left" if heading in ("what", "baseline") else "right")
    for result in results:
        baseline = result.ratios["aten"].baseline
        made.add_row(
            result.what,
            f"{result.rate:g}",
            baseline,
            f"{1000 * result.seconds[baseline]:.3f}",
            *(f"{1000 * result.seconds[name]:.3f}" if name in result.seconds else "" for name in LOWERINGS),
            *(f"{result.ratios[name].median:.2f}x" if name in result.ratios else "" for name in LOWERINGS),
            f"{result.limit:.2f}",
            _memory(result.peak_bytes),
        )
    return made


def _memory(peaks: dict[str, int]) -> str:
    """The default lowering's peak over that of the leanest baseline."""
    return f"{peaks['auto'] / min(peaks[name] for name in peaks if name not in LOWERINGS):.2f}" if peaks else ""


def _draw(results: list[Result], axes: Sequence[Axes]) -> None:
    for place, name in enumerate(LOWERINGS):
        found = [(index, result.ratios[name].median) for index, result in enumerate(results) if name in result.ratios]
        axes[0].bar([index + 0.27 * place for index, _ in found], [ratio for _, ratio in found], width=0.27, label=name)
    axes[0].plot(range(len(results)), [result.limit for result in results], "k_", label="limit")
    names = [f"{result.what.partition(', forward')[0]}, p={result.rate:g}" for result in results]
    axes[0].set_xticks(range(len(results)), names, rotation=90, fontsize=6)
    axes[0].set_ylabel("times faster")
    axes[0].legend()


def hardware(device: str) -> dict[str, str]:
    """What the figures depend on besides the machine."""
    versions = {"triton": metadata.version("triton"), "cuda": str(torch.version.cuda)}
    if device != "cuda":
        return {"gpu": "none", **versions}
    return {"gpu": torch.cuda.get_device_name(), "driver": _driver(), **versions}


def _driver() -> str:
    if (tool := shutil.which("nvidia-smi")) is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return next(iter(printed.split()), "unknown")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dropfx bench gpu`."""
    parser.add_argument("--sizes", nargs="+", type=arguments.positive, default=SIZES, help="M = N = K (4096 8192)")
    parser.add_argument("--rates", nargs="+", type=arguments.rate, default=RATES, help="drop rates (.3 .5 .7)")
    parser.add_argument("--net", type=arguments.net, default=NET, help="captured as CUDA graphs (784-2048-2048-10)")
    parser.add_argument("--batch", nargs="+", type=arguments.positive, default=BATCHES, help="its batches (128 1024)")
    parser.add_argument("--classifier", type=arguments.net, default=CLASSIFIER, help="(VGG16's, 25088-4096-4096-1000)")
    parser.add_argument("--classifier-batch", type=arguments.positive, default=CLASSIFIER_BATCH, help="(256)")
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
    console, bench = Console(), Bench(DTYPES[args.dtype], args.device, args.rounds)
    results: list[Result] = []
    with console.status("") as status:
        for result in results_of(bench, args):
            results.append(result)
            status.update(f"{result.what}, p={result.rate:g}")
    console.print(table(results))
    folder = Path(args.out)
    content = {**hardware(args.device), "dtype": args.dtype, "cases": [asdict(result) for result in results]}
    report.write_json(folder / "gpu.json", content)
    report.write_markdown(folder / "gpu.md", table(results))
    console.print(report.chart(folder / "gpu.png", 1, partial(_draw, results), width=9), highlight=False)
    console.print(f"figures: {folder / 'gpu.json'}", highlight=False)
    return 0
