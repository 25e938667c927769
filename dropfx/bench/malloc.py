"""Runs a function in a fresh process under chosen settings of glibc's allocator.

glibc returns large blocks to the system when they are freed and faults them in again at the next step; in a training
loop on a CPU that noise is as large as the effects measured here. Raising two thresholds makes it keep them. They are
read when a process starts, so they can only be set for a new one.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

Main = Callable[[argparse.Namespace], int]
P = ParamSpec("P")
R = TypeVar("R")

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def is_tuned() -> bool:
    """Whether this process runs under SETTINGS."""
    return all(os.environ.get(name) == value for name, value in SETTINGS.items())


def tuned(main: Main) -> Main:
    """Makes a command's `main` run itself again under SETTINGS, unless it does already or has `--malloc system`."""

    @functools.wraps(main)
    def again(args: argparse.Namespace) -> int:
        """The command, in a process of its own where this one lacks the settings; returns the exit status."""
        if args.malloc == "tuned" and not is_tuned():
            return in_fresh_process(True, again, args)
        return main(args)

    return again


def in_fresh_process(keep_blocks: bool, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The result of `function(*args, **kwargs)`, run in a new process with (`keep_blocks`) or without SETTINGS.

    The function, its arguments and its result are pickled; its exceptions are raised here.
    """
    context = multiprocessing.get_context("spawn")
    with _environment(keep_blocks), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


@contextmanager
def _environment(keep_blocks: bool) -> Iterator[None]:
    saved = {name: os.environ.pop(name, None) for name in SETTINGS}
    if keep_blocks:
        os.environ.update(SETTINGS)
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
