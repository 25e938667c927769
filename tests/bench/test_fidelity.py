"""Accuracy against PyTorch's dropout, paired by seed: the claim of docs/results, trained anew."""

import argparse
from pathlib import Path

import pytest
from rich.progress import Progress

from dropfx.bench import datasets, fidelity

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist installs it


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "epochs"), [(None, 20), (FASHION, 3)], ids=["mnist-5k", "fashion-mnist"])
def test_block_and_slice_lose_less_than_half_a_point(folder: Path | None, epochs: int) -> None:
    if folder is not None and not folder.is_dir():
        pytest.skip("Fashion-MNIST is not installed (Debian's dataset-fashion-mnist)")
    settings = argparse.Namespace(net=(784, 2048, 2048, 10), rate=0.5, batch=128, seeds=5, variants=["block", "slice"])
    outcome = fidelity.compare(datasets.load(folder), epochs, settings, Progress(disable=True))
    for pattern in settings.variants:
        loss = outcome.loss(pattern)
        assert loss.bound is not None
        assert loss.bound < 0.5, f"{pattern} loses {loss.mean:.2f} points, upper 95% bound {loss.bound:.2f}"
