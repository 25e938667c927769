"""Paired timing of interleaved candidates in one process, and exact peak memory; on a CPU and on a GPU."""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dropfx.planning import timing
from dropfx.planning.timing import Step

_TURN_SECONDS = 0.25
_MAX_STEPS = 20


@dataclass(frozen=True)
class Ratio:
    """How many times faster the subject is than `baseline`: median and quartiles of the per-round ratios."""

    baseline: str
    median: float
    low: float
    high: float


def interleave(
    steps: Mapping[str, Step], rounds: int, turn_seconds: float = _TURN_SECONDS, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds per step of each candidate, one entry a round.

    In a round every candidate runs the same few steps, so that a drift of the machine (clock, neighbours) hits all
    alike; the first of a round moves on by one from round to round. Each runs two steps untimed beforehand, for
    compilation and caches.

    Args:
        steps: a training step, or any unit of work, per candidate.
        rounds: number of rounds, at least 1.
        turn_seconds: time that the slowest candidate's turn should take; sets the steps of a turn (1 to 20).
        device: type of the device that the steps run on; a GPU is timed by its own events.
    """
    names = list(steps)
    for name in names:
        steps[name]()
    slowest = max(timing.seconds(steps[name], 1, device) for name in names)
    count = min(_MAX_STEPS, max(1, round(turn_seconds / slowest)))
    times: dict[str, list[float]] = {name: [] for name in names}
    # what lives now is set aside: a collection inside of someone's turn then costs next to nothing
    gc.collect()
    gc.freeze()
    try:
        for number in range(rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                times[name].append(timing.seconds(steps[name], count, device) / count)
    finally:
        gc.unfreeze()
    return times


def ratio(times: Mapping[str, Sequence[float]], subject: str, baselines: Sequence[str]) -> Ratio:
    """The subject against the baseline of the lowest median time."""
    baseline = min(baselines, key=lambda name: statistics.median(times[name]))
    ratios = [slow / fast for slow, fast in zip(times[baseline], times[subject], strict=True)]
    low, median, high = quartiles(ratios)
    return Ratio(baseline, median, low, high)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, interpolated between order statistics."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def peak_memory(step: Step, device: str = "cpu") -> int:
    """Bytes that one call of `step` allocates at its peak above the level at which it began.

    On a GPU its allocator keeps count. On a CPU they are counted from the profiler's record of every allocation and
    release of PyTorch's CPU allocator. The process' own size is no measure: it also holds what malloc keeps, the
    libraries' scratch space and the profiler itself, and its high-water mark never falls, so a second candidate could
    not be measured. Memory that a GEMM library takes for itself is not seen, for no candidate. A release of a block
    from before the call is not in the record, so the caller sees to it that the resting state is at rest: gradients
    None, optimizer state present.
    """
    if device == "cuda":
        resting = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - resting
    # the profiler's library greets on stderr below its highest level
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [e["args"] for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    if not memory:
        return 0
    # "Total Allocated" may carry a rest of earlier profiles
    resting = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    return int(max(0, *(entry["Total Allocated"] - resting for entry in memory)))
