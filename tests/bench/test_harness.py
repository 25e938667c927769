"""Timing in turns, exact peaks, the ceiling's formula, the paired bound, and processes with other malloc settings."""

import argparse
import json
import os
import time

import pytest
import torch
from rich.table import Table

from dropfx import bench
from dropfx.bench import arguments, fidelity, harness, malloc, mlp, paper, report
from dropfx.bench.training import mlp as make_mlp
from dropfx.bench.training import sgd, train_step
from dropfx.errors import InvalidOption


def test_candidates_take_turns_and_none_is_always_first():
    order = []
    steps = {name: lambda name=name: order.append(name) or time.sleep(0.001) for name in "abc"}
    times = harness.interleave(steps, rounds=3, turn_seconds=0)
    assert "".join(order[-9:]) == "abcbcacab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratio_is_paired_by_round_and_takes_the_faster_baseline():
    times = {"slow": [4.0, 8.0, 40.0], "fast": [2.0, 4.0, 20.0], "mine": [1.0, 2.0, 5.0]}
    ratio = harness.ratio(times, "mine", ["slow", "fast"])
    assert ratio.baseline == "fast"
    assert ratio.median == 2
    assert (ratio.low, ratio.high) == (2, 3)


def test_peak_memory_counts_every_byte_once():
    kept = []

    def step():
        x = torch.empty(1000)  # 4,000 bytes
        y = torch.empty(500)  # 2,000 more: the peak
        del x
        kept.append(y)
        torch.empty(250)

    assert harness.peak_memory(step) == 6000
    # a block that an earlier profile saw must not shift the level
    assert harness.peak_memory(step) == 6000
    assert harness.peak_memory(lambda: None) == 0


def test_peak_memory_of_a_training_step():
    model = make_mlp((64, 128, 8), None)
    optimizer = sgd(model)
    images, labels = torch.randn(4, 64), torch.zeros(4, dtype=torch.long)
    train_step(model, optimizer, images, labels)
    optimizer.zero_grad(set_to_none=True)
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
    peak = harness.peak_memory(lambda: train_step(model, optimizer, images, labels))
    assert gradients < peak < 2 * gradients


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((784, 2048, 2048, 10), (1.87, 3.32, 7.50)), ((784, 4096, 4096, 10), (1.94, 3.59, 8.76))],
)
def test_flop_ceiling(sizes, expected):
    for rate, value in zip((0.3, 0.5, 0.7), expected, strict=True):
        assert mlp.flop_ceiling(sizes, [1 - rate] * 2) == pytest.approx(value, abs=0.006)


def test_tile_ceiling():
    """The first layer is dense, the others keep 1 - p: (2ab + 3b^2 + 30b) / (2ab + (1 - p)(3b^2 + 30b))."""
    assert paper.tile_ceiling((8, 4, 4, 2), 0.5) == pytest.approx((64 + 48 + 24) / (64 + 36))


def test_default_cases_leave_out_the_large_net_at_the_small_batch():
    cases = mlp.cases(None, None, [0.5])
    assert [(case.sizes[1], case.batch) for case in cases] == [(2048, 128), (2048, 1024), (4096, 1024)]
    assert len(mlp.cases([(8, 8, 2)], [4, 8], [0.3, 0.5])) == 4


def test_paired_bound():
    # differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(.95, 2) = 2.920
    loss = fidelity.paired_loss([91.0, 92.0, 93.0], [90.0, 90.0, 90.0])
    assert loss.mean == pytest.approx(2)
    assert loss.bound == pytest.approx(2 + 2.920 / 3**0.5)
    assert fidelity.paired_loss([1.0], [0.5]).bound is None


def test_unknown_variants_are_refused():
    with pytest.raises(InvalidOption, match="block@4"):
        fidelity.prepare("block@many", (8, 8, 2), 0.5)
    with pytest.raises(InvalidOption, match="row:2"):
        fidelity.prepare("block:2", (8, 8, 2), 0.5)
    with pytest.raises(InvalidOption, match="nonsense"):
        fidelity.prepare("nonsense", (8, 8, 2), 0.5)


@pytest.mark.parametrize("text", ["784", "784-10", "784-x-10", "784-0-10", ""])
def test_nets_are_checked(text):
    with pytest.raises(argparse.ArgumentTypeError, match="no net"):
        arguments.net(text)


@pytest.mark.parametrize("text", ["0", "1", "-.5", "half", "nan"])
def test_rates_are_checked(text):
    with pytest.raises(argparse.ArgumentTypeError, match="no drop rate"):
        arguments.rate(text)


def test_malloc_settings_reach_a_fresh_process(monkeypatch):
    for name in malloc.SETTINGS:
        monkeypatch.setenv(name, "1")
    assert malloc.in_fresh_process(True, os.getenv, "MALLOC_TRIM_THRESHOLD_") == "8589934592"
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert not malloc.is_tuned()


def test_report_files(tmp_path):
    table = Table(title="times")
    table.add_column("net")
    table.add_row("784-10")
    report.write_markdown(tmp_path / "new" / "a.md", table)
    text = (tmp_path / "new" / "a.md").read_text()
    assert "**times**" in text
    assert "| 784-10 |" in text
    assert table.title == "times"
    report.write_json(tmp_path / "a.json", {"x": 1})
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["x"] == 1
    assert content["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", [name for name in bench.BENCHES if name != "gpu"])  # which has tests of its own
def test_every_bench_runs_small(name, tmp_path, capsys):
    module = bench.load(name)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    path = tmp_path / "text"
    path.write_text("one two three four\n" * 40)
    tmp_path = tmp_path / "out"
    small = {
        "mlp": "--nets 16-32-32-4 --batch 8 --rates .5 --rounds 2 --baselines eager",
        "compile": "--cases mlp-2048-128-0.5 --inner aot_eager --rounds 1 --compile-runs 1",
        "lstm": "--units 32 --vocabulary 100 --batch 4 --window 5 --rates .5 --rounds 2 --baselines eager",
        "rows": "--nets vit --batch 2 --rates .5 --rounds 1",
        "predictions": "--models mlp transformer --widths 16 --batch 32 --rates .5 --rounds 1",
        "perplexity": f"--text {path} --units 16 --batch 4 --epochs 2 --variants none block",
        "fidelity": "--net 784-64-64-10 --epochs 1 --seeds 2 --samples 256 --variants none block@2 row:2",
        "paper": "--nets 784-64-64-10 --batch 8 --rates .5 --rounds 2 --accuracy-net 784-64-64-10 --seeds 2"
        " --epochs 1 --samples 256",
    }[name]
    args = parser.parse_args([*small.split(), "--malloc", "system", "--out", str(tmp_path)])
    assert module.main(args) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.{end}" for end in ("json", "md", "png")]
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["machine"]["cores"] == os.cpu_count()
    headings = {
        "mlp": "speed-up",
        "lstm": "1.24-1.85x",
        "compile": "Seconds until",
        "fidelity": "accuracy",
        "predictions": "worst default",
        "rows": "vit",
        "perplexity": "Bernoulli",
        "paper": "FLOP ceiling",
    }
    assert headings[name] in capsys.readouterr().out


@pytest.mark.parametrize(("name", "nothing"), [("fidelity", "--epochs 0"), ("paper", "--rounds 0 --seeds 0")])
def test_nothing_to_measure_is_an_error(name, nothing):
    parser = argparse.ArgumentParser()
    bench.load(name).add_arguments(parser)
    with pytest.raises(InvalidOption, match="got 0"):
        bench.load(name).main(parser.parse_args([*nothing.split(), "--malloc", "system"]))


def test_fidelity_keeps_what_a_run_cut_short_has(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    fidelity.add_arguments(parser)
    trained = iter([90.0, 91.0])  # one seed of two variants, then the run ends
    monkeypatch.setattr(fidelity, "train", lambda *_args: next(trained))
    args = parser.parse_args(["--seeds", "2", "--variants", "none", "--malloc", "system", "--out", str(tmp_path)])
    with pytest.raises(RuntimeError, match="StopIteration"):
        fidelity.main(args)
    (outcome,) = json.loads((tmp_path / "fidelity.json").read_text())["outcomes"]
    assert outcome["accuracy"] == {"bernoulli": [90.0], "none": [91.0]}
