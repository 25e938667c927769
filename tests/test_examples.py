"""The examples run as a user runs them, and learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *options):
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *options]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "options"),
    [("mnist_mlp.py", ("--epochs", "2", "--hidden", "256")), ("vgg16_classifier.py", ("--small", "--epochs", "3"))],
)
def test_example_learns(script, options):
    printed = run(script, *options)
    accuracies = [float(value) for value in re.findall(r"test accuracy ([\d.]+)%", printed)]
    assert len(accuracies) == int(options[-1] if "--small" in options else 2)
    assert accuracies[-1] > 60


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_distributed_example_learns(wrapper):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(EXAMPLES / "distributed.py"), "--with", wrapper]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "PYTHONWARNINGS": "", "OMP_NUM_THREADS": "1"}
    options = ["--epochs", "2", "--hidden", "256"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    accuracies = [float(value) for value in re.findall(r"test accuracy ([\d.]+)%", done.stdout)]
    assert len(accuracies) == 2  # one rank prints
    assert accuracies[-1] > 60
    assert "Warning" not in done.stderr, done.stderr


@pytest.mark.parametrize("script", ["mnist_mlp.py", "vgg16_classifier.py", "distributed.py"])
def test_one_line_is_all_that_dropfx_adds(script):
    code = (EXAMPLES / script).read_text().partition('"""\n\nimport')[2]
    uses = [line for line in code.splitlines() if "dropfx" in line]
    assert [line.partition("(")[0] for line in uses] == ["import dropfx", "dropfx.compile"]
