"""How long work takes: by the clock on a CPU, by events on a GPU, whose work goes on after a call returns."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Step = Callable[[], object]


def seconds(step: Step, count: int = 1, device: str = "cpu") -> float:
    """Seconds of `count` steps in a row on a device of type `device`."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
