"""Processes with a gloo process group run many checks; the parent asserts on each.

Importing torch takes seconds a process, so one pair of processes runs all checks of some modules. Each check gets a
process group of its own: one that fails leaves the others alone, and its peer sees a closed connection.
"""

from __future__ import annotations

import datetime
import importlib
import json
import pathlib
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.multiprocessing

WORLD = 2
Results = dict[str, list[str]]
TORCHS_OWN = [("", DeprecationWarning), ("The .grad attribute of a Tensor that is not a leaf", UserWarning)]
"""Warnings (message, category) that PyTorch gives itself: Dynamo looks at the gradients of FSDP2's views."""


class Checks(dict[str, Callable[[], None]]):
    """The checks of a module, by name; a check runs on every rank."""

    def __call__(self, check: Callable[[], None]) -> Callable[[], None]:
        assert check.__name__ not in self
        self[check.__name__] = check
        return check


def names_of(*modules: str) -> list[str]:
    """Names of all checks, as keys of what `run` returns."""
    return [f"{module}.{name}" for module in modules for name in _checks(module)]


def run(modules: Sequence[str], folder: pathlib.Path, timeout: float) -> Results:
    """Run the `checks` of the modules on every rank; name -> the traceback of each rank, "" where it passed."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(rank, modules, str(folder)), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    found = [_read(folder / f"results_{rank}.jsonl") for rank in range(WORLD)]
    return {name: [results.get(name, "did not finish") for results in found] for name in names_of(*modules)}


def _checks(module: str) -> Checks:
    found: Checks = importlib.import_module(f"tests.distributed.{module}").checks
    return found


def _read(file: pathlib.Path) -> dict[str, str]:
    return dict(json.loads(line) for line in file.read_text().splitlines()) if file.exists() else {}


def _work(rank: int, modules: Sequence[str], folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for message, category in TORCHS_OWN:
        warnings.filterwarnings("ignore", message, category)
    with (pathlib.Path(folder) / f"results_{rank}.jsonl").open("w") as results:
        for name in names_of(*modules):
            module, _, check = name.partition(".")
            error = ""
            try:
                with _process_group(rank, f"{folder}/{name}"):
                    torch.manual_seed(0)
                    _checks(module)[check]()
            except BaseException:
                error = traceback.format_exc()
            results.write(json.dumps((name, error)) + "\n")
            results.flush()


@contextmanager
def _process_group(rank: int, rendezvous: str) -> Iterator[None]:
    """A gloo group over all ranks, whose collectives give up."""
    torch._dynamo.reset()
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
