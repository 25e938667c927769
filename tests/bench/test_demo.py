"""A tiny run of `dropfx demo`."""

import argparse
import sys

import pytest
import torch

from dropfx.bench import demo, malloc


def parse(*options):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    small = "--samples 256 --test-samples 100 --hidden 64 --malloc system"
    return parser.parse_args([*small.split(), *options])


def test_demo_prints_a_table_and_writes_a_chart(tmp_path, capsys):
    path = tmp_path / "curves.png"
    assert demo.main(parse("--epochs", "2", "--out", str(path))) == 0
    printed = capsys.readouterr().out
    for word in ("no dropout", "PyTorch dropout", "dropfx", "train", "acc.", "loss", "s/epoch", "speed-up"):
        assert word in printed
    assert path.read_bytes().startswith(b"\x89PNG")


def test_demo_without_matplotlib(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "curves.png"
    assert demo.main(parse("--epochs", "1", "--out", str(path))) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not path.exists()


def test_ways_start_alike_and_differ_in_dropout_only():
    ways = demo.make_ways((16, 32, 32, 4), rate=0.5, seed=3)
    weights = [way.model.state_dict() for way in ways]
    plain, pytorch, ours = (list(state.values()) for state in weights)
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(plain, pytorch, ours, strict=True))
    assert weights[1].keys() == weights[2].keys()
    kinds = [[type(module).__name__ for module in way.model.children()] for way in ways]
    assert kinds[1] == kinds[2]
    assert "Dropout" not in kinds[0]


def test_demo_goes_on_in_a_tuned_process(monkeypatch):
    calls = []
    monkeypatch.setattr(malloc, "in_fresh_process", lambda *args: calls.append(args) or 7)
    monkeypatch.setattr(malloc, "is_tuned", lambda: False)
    args = parse()
    args.malloc = "tuned"
    assert demo.main(args) == 7
    assert calls == [(True, demo.main, args)]


@pytest.mark.slow
def test_dropout_trains_to_the_same_accuracy(tmp_path):
    from dropfx.bench import datasets

    data = datasets.load()
    ways = {way.name: way for way in demo.make_ways((784, 512, 512, 10), rate=0.5, seed=0)}
    for _ in range(10):
        for way in ways.values():
            way.train_epoch(data, 128)
    assert ways[demo.DROPFX].test_accuracy[-1] > ways[demo.PYTORCH].test_accuracy[-1] - 0.02
