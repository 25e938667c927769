"""`python -m tests.mutation`: puts faults into a copy of the library, one after another, and runs the tests on it.

Exit status 1 where the tests pass with a fault in it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.mutation.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
COPIED = ("dropfx", "passes", "tests", "docs", "examples", "pyproject.toml", "README.md")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of faults, from 0 (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the tests")
    arguments = parser.parse_args()
    console, missed = Console(soft_wrap=True), 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source, target = ROOT / name, copy / name
            shutil.copytree(source, target, symlinks=True) if source.is_dir() else shutil.copy(source, target)
        for number in arguments.only or range(len(FAULTS)):
            found = found_by(FAULTS[number], copy, arguments.workers)
            missed += not found
            console.print(f"{number:3} {FAULTS[number].file}: {found or 'NOT FOUND'}", markup=False, highlight=False)
    console.print(f"{missed} not found")
    return int(missed > 0)


def found_by(fault: Fault, copy: Path, workers: int) -> str:
    """The first test that fails with the fault in the copy, "" where none does."""
    file = copy / fault.file
    right = file.read_text()
    assert right.count(fault.text) == 1, f"{fault.file} has {right.count(fault.text)} places with {fault.text!r}"
    file.write_text(right.replace(fault.text, fault.faulty))
    try:
        return first_failure([f"tests/{name}" for name in fault.tests.split()], copy, workers) or first_failure(
            ["tests"], copy, workers
        )
    finally:
        file.write_text(right)


def first_failure(tests: Sequence[str], copy: Path, workers: int) -> str:
    options = [
        "-x",
        "-q",
        "--no-header",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-n",
        str(workers),
        "--dist",
        "loadgroup",
    ]
    command = [sys.executable, "-B", "-m", "pytest", *options, *tests]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    made = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in made.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if made.returncode and not lines:
        return made.stdout.strip().splitlines()[-1]
    return lines[0].partition(" ")[2].partition(" - ")[0] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
