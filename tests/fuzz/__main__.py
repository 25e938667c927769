"""`python -m tests.fuzz --graphs 10000 --seed 0`: random programs under each front end; exit status 1 on a mismatch."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.fuzz.check import FRONT_ENDS, Verdict, check
from tests.fuzz.generate import generate
from tests.fuzz.minimise import minimise
from tests.fuzz.program import Program

CHUNK = 25
"""Programs that a process takes at a time; it is replaced after some such turns, for Dynamo does not forget."""
Found = tuple[int, str, Verdict, str]


def main() -> int:
    arguments = _arguments()
    console, started = Console(), time.monotonic()
    counts, compared, sites, done = Counter[str](), 0, 0, 0
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    indices = (
        [arguments.only] if arguments.only is not None else range(arguments.first, arguments.first + arguments.graphs)
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("programs", total=len(indices) * len(arguments.front_end))
        for index, front_end, verdict, text in _all(arguments, indices, started):
            done += 1
            counts[verdict.kind] += 1
            counts["refused by PyTorch"] += verdict.raising
            compared, sites = compared + verdict.compared, sites + verdict.sites
            progress.update(task, advance=1, description=_line(counts, done, started))
            if not console.is_terminal and done % 500 == 0:
                console.print(f"{done}: {_line(counts, done, started)}")
            if text:
                console.print(f"\nseed {arguments.seed} index {index} front end {front_end}", style="bold")
                console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{done} programs, {compared} steps compared with {sites} rewritten sites: {dict(counts)}")
    wrong = sum(counts[kind] for kind in ("different", "raises", "silent"))
    console.print(f"{wrong} mismatches")
    return int(wrong > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--graphs", type=int, default=1000, help="programs for each front end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first program")
    parser.add_argument("--only", type=int, help="the program of this index alone")
    parser.add_argument("--front-end", nargs="+", choices=FRONT_ENDS, default=["compile", "eager", "aot_eager"])
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no program is begun")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--show", action="store_true", help="print the programs whose faults are PyTorch's own too")
    return parser.parse_args()


def _line(counts: Counter[str], done: int, started: float) -> str:
    wrong = sum(counts[kind] for kind in ("different", "raises", "silent"))
    return f"{wrong} mismatches, {counts['pytorch']} of PyTorch, {done / (time.monotonic() - started):.1f} a second"


def _all(arguments: argparse.Namespace, indices: range | list[int], started: float) -> Iterator[Found]:
    """Every verdict; in this process where one is enough."""
    jobs = [
        (arguments.seed, index, front_end, arguments.show) for index in indices for front_end in arguments.front_end
    ]
    until = started + arguments.budget
    if arguments.workers == 1:
        torch.set_num_threads(1)
        for job in jobs:
            if time.monotonic() > until:
                return
            yield _one(*job)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, spawn, torch.set_num_threads, (1,), max_tasks_per_child=20) as pool:
        chunks = [jobs[k : k + CHUNK] for k in range(0, len(jobs), CHUNK)]
        waiting = [pool.submit(_some, chunk, until - time.monotonic() + time.time()) for chunk in chunks]
        for future in as_completed(waiting):
            yield from future.result()


def _some(jobs: list[tuple[int, int, str, bool]], until: float) -> list[Found]:
    return [_one(*job) for job in jobs if time.time() < until]


def _one(seed: int, index: int, front_end: str, show: bool) -> Found:
    """The verdict on a program, and what to print of it."""
    with _quiet():
        program = generate(seed, index)
        verdict = check(program, front_end)
        if not verdict.wrong and not (show and verdict.kind == "pytorch"):
            return index, front_end, verdict, ""
        smaller = minimise(program, lambda candidate: _fails_alike(candidate, front_end, verdict))
        again = check(smaller, front_end)
    return (
        index,
        front_end,
        verdict,
        "\n".join(
            [
                f"{verdict.kind} at step {verdict.step}",
                *verdict.lines[:8],
                program.listing(),
                f"# minimised: {again.kind} at step {again.step}",
                *again.lines[:8],
                smaller.listing(),
            ]
        ),
    )


def _fails_alike(program: Program, front_end: str, verdict: Verdict) -> bool:
    """Whether a smaller program fails; one that is not even a program does not."""
    try:
        found = check(program, front_end)
    except Exception:
        return False
    return found.kind == verdict.kind and not found.raising


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that PyTorch's compilers log of each error."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    sys.exit(main())
