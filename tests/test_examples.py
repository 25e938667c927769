"""The examples run as a user runs them, and learn."""

import ast
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

import dropfx

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *options):
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *options]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("mnist_mlp.py", ("--epochs", "2", "--hidden", "256")),
        pytest.param("vgg16_classifier.py", ("--small", "--epochs", "3"), marks=pytest.mark.slow),
    ],
)
def test_example_learns(script, options):
    printed = run(script, *options)
    accuracies = [float(value) for value in re.findall(r"test accuracy ([\d.]+)%", printed)]
    assert len(accuracies) == int(options[-1] if "--small" in options else 2)
    assert accuracies[-1] > 60


def test_vision_transformer_trains_both_ways():
    options = ["--samples", "400", "--epochs", "1", "--units", "32", "--depth", "2", "--batch", "40", "--seeds", "2"]
    printed = run("vision_transformer.py", *options)
    assert len(re.findall(r"test accuracy [\d.]+%, [\d.]+%; [\d.]+ s an epoch", printed)) == 2
    assert re.search(r"accuracy with skipping: [-+][\d.]+ points \(standard error", printed)


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


@pytest.fixture
def text(tmp_path):
    """A language that is easy to learn, of 8 words; 23 windows of 4 columns and 10 steps are for training."""
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven eight\n" * 110)
    return path


LANGUAGE_MODEL = ("--size", "32", "--batch", "4", "--steps", "10", "--epochs", "3")


def test_language_model_learns(text):
    printed = run("lstm_language_model.py", *LANGUAGE_MODEL, "--text", str(text), "--p", ".2")
    figures = re.findall(r"train perplexity ([\d.]+), valid ([\d.]+), test ([\d.]+), ", printed)
    assert len(figures) == 3
    assert float(figures[0][0]) > 4
    assert max(map(float, figures[-1])) < 2, printed


@pytest.fixture
def language_model(monkeypatch, capsys):
    """Runs the example in this process: its epochs' lines without the times."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["lstm_language_model.py", *LANGUAGE_MODEL, *map(str, options)])
        # the pattern is drawn at this size too
        monkeypatch.setattr(dropfx, "compile", partial(COMPILE, min_speedup=0))
        runpy.run_path(str(EXAMPLES / "lstm_language_model.py"), run_name="__main__")
        return re.findall(r"(epoch .* test .*), ", capsys.readouterr().out)

    return call


COMPILE = dropfx.compile


def test_language_model_draws_by_groups(language_model, text):
    """As many draws as asked for, or one for each step: other masks of the same seed, and all learn."""
    printed = {groups: language_model("--text", text, "--p", ".2", "--groups", groups) for groups in (1, 2, "time")}
    assert len({lines[0] for lines in printed.values()}) == 3
    for lines in printed.values():
        assert float(lines[-1].rpartition("test ")[2]) < 3, lines  # a guess: 9


@pytest.mark.parametrize("implementation", ["bernoulli", "dropfx"])
@pytest.mark.parametrize("stop", [7, 23, 30])  # within the first epoch, at its end, within the second
def test_language_model_resumes_exactly(language_model, text, tmp_path, implementation, stop):
    options = ("--text", text, "--dropout-impl", implementation, "--flat-epochs", "1")
    straight, resumed = tmp_path / "straight.pt", tmp_path / "resumed.pt"
    printed = language_model(*options, "--checkpoint", straight)
    first = language_model(*options, "--checkpoint", resumed, "--stop-after", stop)
    assert len(first) == stop // 23
    torch.manual_seed(1)  # what another process would begin with
    rest = language_model(*options, "--checkpoint", resumed, "--resume")
    assert first + rest == printed
    one, other = (torch.load(path) for path in (straight, resumed))
    assert one["steps_done"] == 3 * 23
    for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "/missing.txt"), "cannot read /missing.txt"),
        (("--text", "TEXT", "--batch", "200"), "too few for --batch 200"),
        (("--text", "TEXT", "--size", "none"), "--size: got 'none', accepted is int above 0"),
        (("--text", "TEXT", "--p", "2"), "between 0 and 1"),
        (("--text", "TEXT", "--pattern", "stripes"), "pattern: got 'stripes'"),
        (("--text", "TEXT", "--groups", "none"), "groups: got 'none'"),
        (("--text", "TEXT", "--resume"), "--resume: needs --checkpoint"),
        (("--text", "TEXT", "--checkpoint", "TEXT"), "is there already"),
        (("--text", "TEXT", "--checkpoint", "TEXT", "--resume"), "is no checkpoint"),
        (("--text", "TEXT", "--brown", "x"), "not allowed with"),
    ],
)
def test_language_model_refuses(language_model, text, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        language_model(*(str(text) if option == "TEXT" else option for option in options))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_language_model_goes_on_with_its_own_settings_only(language_model, text, tmp_path, capsys):
    options = ("--text", text, "--checkpoint", tmp_path / "a.pt", "--stop-after", "3")
    language_model(*options)
    with pytest.raises(SystemExit):
        language_model(*options, "--resume", "--seed", "5")
    assert "--seed: got 5, but" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["mnist_mlp.py", "vgg16_classifier.py", "distributed.py", "lstm_language_model.py"])
def test_one_line_is_all_that_dropfx_adds(script):
    nodes = list(ast.walk(ast.parse((EXAMPLES / script).read_text())))
    imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [line for line in imports if "dropfx" in line] == ["import dropfx"]
    uses = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "dropfx"]
    assert [use.attr for use in uses] == ["compile"]
