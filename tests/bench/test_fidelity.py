"""Accuracy against PyTorch's dropout, paired by seed: the claim of docs/results, trained anew; an hour on two cores."""

import argparse
from pathlib import Path

import pytest
from rich.progress import Progress

from dropfx.bench import datasets, fidelity

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist lies."""


def loses_less_than_half_a_point(folder, epochs, schedule):
    settings = argparse.Namespace(
        net=(784, 2048, 2048, 10), rate=0.5, batch=128, seeds=5, schedule=schedule, variants=["block", "slice"]
    )
    *_, outcome = fidelity.compare(datasets.load(folder), epochs, settings, Progress(disable=True))
    for pattern in settings.variants:
        loss = outcome.loss(pattern)
        assert loss.bound is not None
        assert loss.bound < 0.5, f"{pattern} loses {loss.mean:.2f} points, upper 95% bound {loss.bound:.2f}"


@pytest.mark.slow
def test_block_and_slice_on_mnist():
    loses_less_than_half_a_point(None, epochs=20, schedule="constant")


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_block_and_slice_on_fashion_mnist():
    loses_less_than_half_a_point(FASHION, epochs=10, schedule="cosine")
