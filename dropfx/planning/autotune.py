"""Measured choices: which lowering of an op is faster on this device, and by which tiles its kernels are.

Each is measured once for a shape and kept in a JSON file by device and versions. A file that cannot be read, or part of
one that makes no sense, counts for nothing; writers replace the whole file at once, so that several processes may tune.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

import dropfx.kernels.configs as configs
from dropfx.graph import machine_files
from dropfx.kernels.configs import Config
from dropfx.planning import timing
from dropfx.planning.timing import Step

Timer = Callable[[Step], float]
_WARM_UP, _REPEATS = 2, 7


class Tuner:
    """What was measured on one device.

    Args:
        path: the file; its folder is made when there is something to keep.
        timer: seconds of a step; the device's by default.

    Attributes:
        seconds: op with its shapes -> lowering -> seconds.
    """

    def __init__(self, path: Path, timer: Timer) -> None:
        self._path, self._timer = path, timer
        self.seconds, tiles = _read(path)
        configs.chosen.update(tiles)

    def measure(self, key: str, candidates: Mapping[str, Step]) -> dict[str, float]:
        """Seconds of each candidate, by the file or measured now; "triton" by its fastest tiles.

        Raises whatever a candidate raises at its first call.
        """
        known = self.seconds.get(key, {})
        if known.keys() == candidates.keys():
            return known
        if "triton" in candidates:
            self._tune(candidates["triton"])
        self.seconds[key] = {name: self._timer(step) for name, step in candidates.items()}
        self._keep()
        return self.seconds[key]

    def _tune(self, step: Step) -> None:
        """Choose the tiles of the step's products, one after another, by the time of the whole step."""
        with configs.listening() as asked:
            step()
        for product, tiles in asked.items():
            if product not in configs.chosen and len(tiles) > 1:
                configs.chosen[product] = min(tiles, key=lambda tile: self._time_with(product, tile, step))

    def _time_with(self, product: str, tile: Config, step: Step) -> float:
        configs.chosen[product] = tile
        try:
            return self._timer(step)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a tile that the device has no room for
            return math.inf
        finally:
            del configs.chosen[product]

    def _keep(self) -> None:
        """Add what was measured to the file; without one, the process keeps it."""
        seconds, tiles = _read(self._path)  # what others have found meanwhile
        content = {"seconds": seconds | self.seconds, "tiles": tiles | configs.chosen}
        with suppress(OSError):
            machine_files.write(self._path, content)


def _read(path: Path) -> tuple[dict[str, dict[str, float]], dict[str, Config]]:
    """What makes sense of a file: seconds by op and lowering, tiles by product."""
    content = machine_files.read(path)
    seconds, tiles = (_dict_of(content, name) for name in ("seconds", "tiles"))
    return (
        {key: times for key, times in seconds.items() if _are_seconds(times)},
        {key: Config(*tile) for key, tile in tiles.items() if _is_tile(tile)},
    )


def _dict_of(content: Any, name: str) -> dict[str, Any]:
    found = content.get(name) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def _are_seconds(times: Any) -> bool:
    return isinstance(times, dict) and all(isinstance(t, float) and 0 < t < math.inf for t in times.values())


def _is_tile(tile: Any) -> bool:
    return isinstance(tile, list) and len(tile) == len(Config._fields) and configs.known(Config(*tile))


def timer_for(device: torch.device) -> Timer:
    """Median seconds of a step after some untimed ones, which compile kernels."""

    def timed(step: Step) -> float:
        """Median seconds of the step."""
        # events are of the current device's stream
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for _ in range(_WARM_UP):
                step()
            return statistics.median(timing.seconds(step, 1, device.type) for _ in range(_REPEATS))

    return timed


_tuners: dict[Path, Tuner] = {}


def tuner_for(device: torch.device) -> Tuner:
    """The process' tuner for a device."""
    path = machine_files.folder() / machine_files.file_name(device)
    if path not in _tuners:
        _tuners[path] = Tuner(path, timer_for(device))
    return _tuners[path]
