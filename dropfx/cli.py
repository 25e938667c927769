"""The `dropfx` command."""

from __future__ import annotations

import argparse
import importlib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropfx import bench
from dropfx.bench import calibrate, demo
from dropfx.bench.arguments import groups
from dropfx.errors import DropfxError, InvalidOption
from dropfx.explain import explain
from dropfx.pattern_statistics import picture
from dropfx.testing import assert_equivalent

_INPUT = re.compile(r"(?P<shape>\d+(,\d+)*|)(:(?P<dtype>[a-z]+\d*))?(<(?P<high>\d+))?")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 where a check failed, 2 where the input was bad."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
        return status
    except DropfxError as error:
        print(f"dropfx: {error}", file=sys.stderr)
        return 1 if isinstance(error, AssertionError) else 2


def parse_input(text: str) -> Tensor:
    """A random tensor from "20,35:int64<8800": shape, dtype (float32), exclusive upper bound of integers (2).

    Raises:
        InvalidOption: the text is not of this form.
    """
    found = _INPUT.fullmatch(text.replace(" ", ""))
    dtype = getattr(torch, (found["dtype"] or "float32"), None) if found else None
    if found is None or not isinstance(dtype, torch.dtype):
        raise InvalidOption(f"--input: got {text!r}, accepted is SHAPE[:DTYPE[<HIGH]], such as 20,35:int64<8800")
    shape = [int(size) for size in found["shape"].split(",") if size]
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, int(found["high"] or 2), shape).to(dtype)


def load_model(target: str) -> nn.Module:
    """The model from MODULE:FACTORY or FILE.py:FACTORY; the factory is called without arguments.

    Raises:
        InvalidOption: there is no such module or factory, or the factory returns no nn.Module.
    """
    name, _, factory = target.rpartition(":")
    if not name or not factory:
        raise InvalidOption(f"target: got {target!r}, accepted are MODULE:FACTORY and FILE.py:FACTORY")
    if name.endswith(".py"):
        sys.path.insert(0, str(Path(name).resolve().parent))
        name = Path(name).stem
    else:
        sys.path.insert(0, "")
    try:
        made: Any = importlib.import_module(name)
        for part in factory.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError) as error:
        raise InvalidOption(f"target: {target!r} cannot be loaded: {error}") from error
    model = made if isinstance(made, nn.Module) else made()
    if not isinstance(model, nn.Module):
        raise InvalidOption(f"target: {target!r} returned a {type(model).__name__}, accepted is a torch.nn.Module")
    return model


def _explain(args: argparse.Namespace) -> int:
    report = explain(load_model(args.target), *args.input, options=_options(args))
    print(report)
    if args.plot:
        report.plot(args.plot)
    return 0


def _check(args: argparse.Namespace) -> int:
    model, options = load_model(args.target), _options(args)
    report = explain(model, *args.input, options=options)
    for _ in range(args.draws):
        assert_equivalent(model, *args.input, options=options)
    rewritten = sum(site.rewritten for site in report.sites)
    print(f"exact given the draw in {args.draws} draws; {rewritten} of {len(report.sites)} dropouts rewritten")
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"pattern": args.pattern, "groups": args.groups, "min_speedup": args.min_speedup}
    if args.block != "auto":
        options["block"] = int(args.block)
    return options


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError("must be a finite number")
    return value


def _block(text: str) -> str:
    if text != "auto" and not text.isdigit():
        raise argparse.ArgumentTypeError("must be 'auto' or a positive integer")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dropfx", description="Stop paying for what dropout drops.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    trains = commands.add_parser("demo", help="train an MLP without dropout, with PyTorch's dropout, and with dropfx")
    demo.add_arguments(trains)
    trains.set_defaults(run=demo.main)
    explains = _model_command(commands, "explain", "list the dropouts: which are rewritten, and why the others are not")
    explains.add_argument("--plot", metavar="FILE.png", help="write a bar chart of the FLOPs (needs matplotlib)")
    explains.set_defaults(run=_explain)
    checks = _model_command(commands, "check", "compare the compiled model with the original under the same masks")
    checks.add_argument("--draws", type=int, default=3, help="draws to compare (default: 3)")
    checks.set_defaults(run=_check)
    patterns = commands.add_parser("patterns", help="compare the patterns' statistics with independent dropout's")
    picture.add_arguments(patterns)
    patterns.set_defaults(run=picture.main)
    measures = commands.add_parser("calibrate", help="measure this machine's costs, by which sites are chosen")
    measures.set_defaults(run=calibrate.main)
    benches = commands.add_parser("bench", help="run a benchmark").add_subparsers(required=True, metavar="NAME")
    for name in bench.BENCHES:
        module = bench.load(name)
        measures = benches.add_parser(name, help=(module.__doc__ or "").strip().splitlines()[0])
        module.add_arguments(measures)
        measures.set_defaults(run=module.main)
    return parser


def _model_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text)
    command.add_argument(
        "target",
        metavar="MODULE:FACTORY",
        help="a model, or a function without arguments that returns one; FILE.py:FACTORY works too",
    )
    command.add_argument(
        "--input",
        type=_parse_argument,
        action="append",
        default=[],
        metavar="SHAPE[:DTYPE[<HIGH]]",
        help="shape of one random input, its dtype (default: float32) and, for integers, an exclusive upper bound "
        "(default: 2), such as 20,35:int64<8800; repeat the option for several inputs",
    )
    command.add_argument("--pattern", default="block", help="block, slice, row or tile (default: block)")
    command.add_argument(
        "--groups",
        type=groups,
        default="auto",
        help="draws per batch, or 'time': one per time step, or 'auto': as many as keep what dropout does (default)",
    )
    command.add_argument("--block", type=_block, default="auto", help="units per block, or auto (default: auto)")
    command.add_argument(
        "--min-speedup",
        type=_finite,
        default=1.05,
        help="rewrite dropouts with at least this predicted speed-up; 0: all that can be (default: 1.05)",
    )
    return command


def _parse_argument(text: str) -> Tensor:
    try:
        return parse_input(text)
    except InvalidOption as error:
        raise argparse.ArgumentTypeError(str(error)) from error
