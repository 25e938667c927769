"""The rows of `dropfx bench gpu`: products of one Linear, with and without groups, and steps of whole MLPs."""

from __future__ import annotations

import copy
import importlib
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import dropfx
from dropfx.bench import harness
from dropfx.bench.harness import Ratio
from dropfx.bench.mlp import flop_ceiling
from dropfx.bench.training import mlp, sgd, train_step
from dropfx.planning.timing import Step

LOWERINGS = ("aten", "triton", "auto")
"""Candidates by dropfx; a product alone has no "auto"."""
BLOCK = 64
GROUP = 128
_COPIES = 4
"""Inputs take turns, so that no product finds its own in L2."""


@dataclass
class Result:
    """One row: median seconds of each candidate, the ratio of the fastest baseline to each lowering, peak bytes."""

    what: str
    rate: float
    limit: float
    seconds: dict[str, float]
    ratios: dict[str, Ratio]
    peak_bytes: dict[str, int] = field(default_factory=dict)


class Bench(NamedTuple):
    """How everything is measured.

    Attributes:
        device: "cuda", or "cpu" for a trial with Triton's interpreter.
    """

    dtype: torch.dtype
    device: str
    rounds: int

    def result(self, what: str, rate: float, limit: float, steps: Mapping[str, Step]) -> Result:
        """The row of steps that take turns; those not by dropfx are the baselines."""
        times = harness.interleave(steps, self.rounds, turn_seconds=0.05, device=self.device)
        baselines = [name for name in times if name not in LOWERINGS]
        ratios = {name: harness.ratio(times, name, baselines) for name in times if name in LOWERINGS}
        return Result(what, rate, limit, {name: statistics.median(found) for name, found in times.items()}, ratios)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers of this shape, in the benchmark's dtype on its device."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device)


# -- products -------------------------------------------------------------------------------------------------------


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


def products(bench: Bench, size: int, rate: float) -> Iterator[Result]:
    """Forward, both gradients, and both sides compact, of one Linear with M = N = K = size."""
    block, count = _blocks(size, rate)
    starts = torch.randperm(size // block, device=bench.device)[:count].sort().values * block
    for product in PRODUCTS:
        what = f"{product.what}, {size}"
        runs = starts if product.compact_rows else None, block, starts, block
        gathered = partial(_gathered, runs=runs, mask=product.mask)
        limit = (size / (count * block)) ** (2 if product.compact_rows else 1)
        steps = _candidates(bench, what, rate, product.dense, gathered, (size, count * block))
        yield bench.result(what, rate, limit, steps)


def groups(bench: Bench, size: int, rate: float) -> Result:
    """Forward and both gradients of one Linear, M = N = K = size, with a draw for every 128 rows."""
    block, count = _blocks(size, rate)
    number = max(size // GROUP, 2)
    draws = [torch.randperm(size // block, device=bench.device)[:count].sort().values for _ in range(number)]
    runs = None, 0, torch.stack(draws) * block, block
    what = f"groups of {-(-size // number)} rows, {size}, forward + backward"
    steps = _candidates(
        bench,
        what,
        rate,
        lambda x, w, dy: (x @ w.t(), dy @ w, dy.t() @ x),
        lambda ops, x, w, dy: (
            _gathered(ops, x, w, dy, runs, None, size),
            _gathered(ops, x, w, dy, runs, [True, True, False], size),
        ),
        (size, count * block),
    )
    return bench.result(what, rate, size / (count * block), steps)


class _Ops(NamedTuple):
    """A Linear's gathered products by one lowering."""

    linear: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]


_Runs = tuple[Tensor | None, int, Tensor | None, int]


def _blocks(size: int, rate: float) -> tuple[int, int]:
    """Units in a block, and how many blocks are kept."""
    block = min(BLOCK, size // 4)
    return block, round((1 - rate) * (size // block))


def _inputs(bench: Bench, size: int, kept: int) -> list[list[Tensor]]:
    shapes = (size, size), (size, size), (size, size), (size, kept)
    return [[bench.randn(*shape) for shape in shapes] for _ in range(_COPIES)]


def _gathered(
    ops: _Ops, x: Tensor, w: Tensor, dy: Tensor, runs: _Runs, mask: list[bool] | None, leading: int = 0
) -> object:
    if mask is None:
        return ops.linear(x, w, None, *runs, 1.0, 0, leading)
    return ops.backward(dy, x, w, *runs, 1.0, mask, 0, leading)


def _candidates(
    bench: Bench,
    what: str,
    rate: float,
    dense: Callable[..., object],
    gathered: Callable[..., object],
    sizes: tuple[int, int],
) -> dict[str, Step]:
    """cuBLAS and the lowerings, each with inputs that take turns: dense(x, w, dy), gathered(ops, compact x, w, dy).

    On a GPU each is a CUDA graph, whose time is the device's alone, and the kernels' tiles are tuned.
    """
    importlib.import_module("dropfx.ops.triton_ops")  # registers the ops of Triton
    registered = torch.ops.dropfx
    candidates: dict[str, _Ops | None] = {
        "cuBLAS": None,
        "aten": _Ops(registered.linear.default, registered.linear_backward.default),
        "triton": _Ops(registered.linear_triton.default, registered.linear_backward_triton.default),
    }
    inputs = _inputs(bench, *sizes)

    def product(given: list[Tensor], ops: _Ops | None) -> object:
        """One product with (x, w, dy, compact x): dense without `ops`, else gathered by them."""
        x, w, dy, compact = given
        return dense(x, w, dy) if ops is None else gathered(ops, compact, w, dy)

    turns = {name: [partial(product, given, ops) for given in inputs] for name, ops in candidates.items()}
    if bench.device == "cuda":
        from dropfx.planning.autotune import tuner_for  # imports Triton

        key = f"bench {what}, p={rate:g}, {bench.dtype}"
        tuner_for(torch.device("cuda", torch.cuda.current_device())).measure(key, {"triton": turns["triton"][0]})
        replays = {name: [_captured(step) for step in steps] for name, steps in turns.items()}
        return {name: partial(_next_of, itertools.cycle(steps)) for name, steps in replays.items()}
    return {name: partial(_next_of, itertools.cycle(steps)) for name, steps in turns.items()}


def _next_of(steps: Iterator[Step]) -> object:
    return next(steps)()


# -- steps ----------------------------------------------------------------------------------------------------------


def steps(bench: Bench, sizes: tuple[int, ...], batch: int, rate: float, input_gradient: bool = False) -> Result:
    """Forward and backward of an MLP, and its peak memory: eager, torch.compile and dropfx by each lowering."""
    torch.manual_seed(0)
    written = mlp(sizes, rate).to(device=bench.device, dtype=bench.dtype)
    x = bench.randn(batch, sizes[0]).requires_grad_(input_gradient)

    def step(model: Callable[[Tensor], Tensor]) -> None:
        """Forward and backward of the sum of the outputs."""
        torch.autograd.backward(model(x).sum())

    candidates: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    for name, model, runnable in _models(written, bench):
        at_rest = partial(_rest, model, x)
        run = partial(step, runnable)
        for _ in range(2):
            run()
            at_rest()
        peaks[name] = harness.peak_memory(run, bench.device)
        at_rest()
        candidates[name] = partial(_in_turn, at_rest, run)
    what = f"{_net(sizes)}, batch {batch}, forward + backward"
    result = bench.result(what, rate, _ceiling(written, x, sizes, input_gradient), candidates)
    result.peak_bytes = peaks
    torch.compiler.reset()
    return result


def graphs(bench: Bench, sizes: tuple[int, ...], batch: int, rate: float) -> Result:
    """A whole training step of an MLP, every candidate captured as a CUDA graph (in a trial on a CPU: called)."""
    torch.manual_seed(0)
    written = mlp(sizes, rate).to(device=bench.device, dtype=bench.dtype)
    x, labels = bench.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,), device=bench.device)
    candidates = {}
    for name, model, runnable in _models(written, bench):
        step = partial(train_step, runnable, sgd(model), x, labels)
        candidates[name] = _captured(step) if bench.device == "cuda" else step
    what = f"{_net(sizes)}, batch {batch}, training step as a CUDA graph"
    result = bench.result(what, rate, _ceiling(written, x, sizes, False), candidates)
    torch.compiler.reset()
    return result


def _models(written: nn.Sequential, bench: Bench) -> Iterator[tuple[str, nn.Module, Callable[[Tensor], Tensor]]]:
    """Each candidate's name, its own model, and what to call."""
    for name in ("eager", "torch.compile", *LOWERINGS):
        model = copy.deepcopy(written)
        runnable: Callable[[Tensor], Tensor] = model
        if name == "torch.compile":
            runnable = torch.compile(model, backend="inductor" if bench.device == "cuda" else "eager")
        elif name in LOWERINGS:
            runnable = dropfx.compile(model, lowering=name, min_speedup=0)
        yield name, model, runnable


def _captured(step: Step) -> Step:
    """The step as a graph to replay, after calls on a stream of its own that compile and tune."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _rest(model: nn.Module, x: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    x.grad = None


def _in_turn(first: Step, second: Step) -> None:
    first()
    second()


def _ceiling(written: nn.Module, x: Tensor, sizes: Sequence[int], input_gradient: bool) -> float:
    sites = dropfx.explain(written, x, options={"min_speedup": 0, "lowering": "aten"}).sites
    return flop_ceiling(sizes, [1 - site.drawn_rate for site in sites], input_gradient)


def _net(sizes: Sequence[int]) -> str:
    return "-".join(map(str, sizes))
