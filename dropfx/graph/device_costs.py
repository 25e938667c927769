"""What work costs on a device: the table from which regions are planned.

Figures are for classes of device, not for one machine; they decide what pays, they do not promise times.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from dropfx.graph import machine_files
from dropfx.ops.products import LEAST_WORK


@dataclass(frozen=True)
class DeviceCosts:
    """Rates of one class of device.

    Attributes:
        flops: matrix product, FLOP/s, by dtype size in bytes (4, 8, 2).
        bytes: streaming memory traffic, bytes/s.
        random: random numbers for an unstructured mask, elements/s.
        launch: fixed time of one operation, seconds.
        gathered: fixed time of a gathered operation beyond that of PyTorch's own, forward and backward, in eager code.
        draw: fixed time of a site's draw.
        packed: how many times faster than `flops` large float32 products are by oneDNN: those of gathered weights, and
            those of recurrent layers in one piece.
        fused: share of the library's product rate at which a product with a gather runs. Assumed, not measured; it
            decides only where no measurement can.
    """

    flops: dict[int, float]
    bytes: float
    random: float
    launch: float
    gathered: float = 0.0
    draw: float = 0.0
    packed: float = 1.0
    fused: float = 0.8

    def gemm(self, m: float, n: float, k: float, itemsize: int = 4) -> float:
        """Seconds of an [m, k] @ [k, n] product: the longer of arithmetic and traffic."""
        arithmetic = 2 * m * n * k / self.flops.get(itemsize, self.flops[4])
        traffic = (m * k + k * n + m * n) * itemsize / self.bytes
        return self.launch + max(arithmetic, traffic)

    def packed_gemm(self, m: float, n: float, k: float, itemsize: int = 4) -> float:
        """Seconds of a product as `ops.products` makes it: by oneDNN where that is faster."""
        if self.packed == 1.0 or itemsize != 4 or m * n * k < LEAST_WORK:
            return self.gemm(m, n, k, itemsize)
        # the weight is laid out anew at each call, which few rows do not hide
        return self.launch + 2 * m * n * k / self.flops[4] / self.packed + n * k * itemsize / 2 / self.bytes

    def convolution(self, m: float, n: float, channels: float, taps: int, itemsize: int = 4) -> float:
        """Seconds of m positions of n channels, of `taps` values of each input channel; few fill lanes."""
        padded = math.ceil(n / LANES) * math.ceil(channels / LANES) * LANES**2
        arithmetic = 2 * m * padded * taps / self.flops.get(itemsize, self.flops[4])
        values, weights = m * (n + channels), n * channels * taps
        traffic = (values + 3 * weights) * itemsize / self.bytes  # the weight is laid out anew at each call
        return self.launch + max(arithmetic, traffic)

    def move(self, elements: float, itemsize: int = 4, passes: float = 2.0) -> float:
        """Seconds to stream `elements`, by default read once and written once."""
        return self.launch + elements * itemsize * passes / self.bytes

    def dropout(self, elements: float, itemsize: int = 4, numbers: float | None = None) -> float:
        """Seconds of PyTorch's own dropout, forward and backward: mask, product, product.

        Args:
            elements: of the tensor.
            itemsize: bytes of each.
            numbers: those drawn, where they are fewer: one a channel.
        """
        return (elements if numbers is None else numbers) / self.random + 2 * self.move(elements, itemsize, 3)


LANES = 16
"""Channels that a convolution's vectors hold: fewer cost as many."""

DEVICES: dict[str, DeviceCosts] = {
    "cpu": DeviceCosts(
        flops={4: 1.4e11, 8: 7.0e10, 2: 7.0e10},
        bytes=2.0e10,
        random=2.5e8,
        launch=1.2e-5,
        gathered=1e-4,
        draw=2.5e-5,
        packed=1.3,
    ),
    "cuda": DeviceCosts(flops={4: 5.0e13, 8: 3.0e13, 2: 6.0e14}, bytes=3.0e12, random=5.0e11, launch=5e-6),
}
"""Device type -> costs. `cpu`: a few cores with wide vectors; `cuda`: a current data-centre GPU (from data sheets)."""


def costs_of(device: torch.device) -> DeviceCosts:
    """What was measured by `dropfx calibrate`, or the costs of a device's class; an unknown one is taken for a GPU."""
    return measured(device) or DEVICES.get(device.type, DEVICES["cuda"])


def costs_file(device: torch.device) -> Path:
    """Where `dropfx calibrate` keeps the costs of a device."""
    return machine_files.folder() / f"costs_{machine_files.file_name(device)}"


def measured(device: torch.device) -> DeviceCosts | None:
    """The costs kept for a device; None where there are none, or what there is makes no sense."""
    return _read(costs_file(device)) if device.type == "cpu" else None


@functools.cache
def _read(path: Path) -> DeviceCosts | None:
    content = machine_files.read(path)
    names = {field.name for field in dataclasses.fields(DeviceCosts)}
    if not isinstance(content, dict) or content.keys() != names or not isinstance(content["flops"], dict):
        return None
    flops = content.pop("flops")
    figures = [*flops.values(), *content.values()]
    sound = all(isinstance(figure, float) and 0 < figure < math.inf for figure in figures)
    return DeviceCosts(flops={int(size): rate for size, rate in flops.items()}, **content) if sound else None


def keep(device: torch.device, costs: DeviceCosts) -> Path:
    """Keep measured costs for this and later processes; returns the file.

    Raises:
        OSError: there is no place for it.
    """
    path = costs_file(device)
    machine_files.write(path, dataclasses.asdict(costs))
    _read.cache_clear()
    return path
