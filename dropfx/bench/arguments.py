"""Command-line options that the demo and the benchmarks share."""

from __future__ import annotations

import argparse
import math


def add_malloc(parser: argparse.ArgumentParser) -> None:
    """`--malloc`: allocator settings of the measuring process."""
    parser.add_argument(
        "--malloc",
        choices=("tuned", "system"),
        default="tuned",
        help="tuned: measure in a process whose malloc keeps freed blocks; system: as it is (default: tuned)",
    )


def groups(text: str) -> int | str:
    """Draws a batch, as `dropfx.compile` takes them."""
    return text if text in ("auto", "time") else positive(text)


def net(text: str) -> tuple[int, ...]:
    """Layer sizes from `784-2048-2048-10`: input, one or more hidden, output."""
    try:
        sizes = tuple(int(part) for part in text.split("-"))
    except ValueError:
        sizes = ()
    if len(sizes) < 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no net: expected sizes like 784-2048-2048-10")
    return sizes


def rate(text: str) -> float:
    """A drop rate strictly between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no drop rate between 0 and 1")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)
