"""Accuracy on MNIST-5k against PyTorch's dropout, paired by seed: the claim of docs/results, trained anew."""

import argparse

import pytest
from rich.progress import Progress

from dropfx.bench import datasets, fidelity


@pytest.mark.slow
def test_block_and_slice_lose_less_than_half_a_point() -> None:
    settings = argparse.Namespace(
        net=(784, 2048, 2048, 10), rate=0.5, batch=128, seeds=5, schedule="constant", variants=["block", "slice"]
    )
    *_, outcome = fidelity.compare(datasets.load(), 20, settings, Progress(disable=True))
    for pattern in settings.variants:
        loss = outcome.loss(pattern)
        assert loss.bound is not None
        assert loss.bound < 0.5, f"{pattern} loses {loss.mean:.2f} points, upper 95% bound {loss.bound:.2f}"
