"""`dropfx bench rows`: training steps with stochastic depth, and with dropout of a convolution's channels."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import dropfx
from dropfx.bench import arguments, malloc, steps, steps_report
from dropfx.bench.models import define_operators
from dropfx.bench.steps import Workload
from dropfx.bench.training import sgd, train_step
from dropfx.bench.vit import VisionTransformer
from dropfx.errors import InvalidOption
from dropfx.planning.timing import Step

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A model by its name in `NETS`, a batch size and the rate, which libraries let rise from block to block."""

    net: str
    batch: int
    rate: float

    def workload(self) -> Workload:
        """The model, and its step on random images with random labels."""
        torch.manual_seed(0)
        model, images = NETS[self.net].build(self.rate, self.batch)
        labels = torch.randint(CLASSES, (self.batch,))

        def make_step(runnable: Callable[..., Any], model: nn.Module) -> Step:
            """A step on the same batch, by SGD with momentum."""
            return partial(train_step, runnable, sgd(model), images, labels)

        return Workload(model, (images,), make_step)

    @cached_property
    def _flop_ratio(self) -> float:
        work = self.workload()
        return dropfx.explain(work.model, *work.inputs, options={"min_speedup": 0}).flop_ratio

    def ceiling(self, rates: Sequence[float]) -> float:
        """How many times fewer operations the layers' products take at the rates that the model's sites have.

        Attention's own products are not counted. `rates` are the same for all sites of most models, and not used.
        """
        return self._flop_ratio


@dataclass(frozen=True)
class Net:
    """A model of the bench.

    Attributes:
        build: (rate, batch) -> the model and its images.
        cases: (batch, rate) of the published figures.
        package: what must be installed.
    """

    build: Callable[[float, int], tuple[nn.Module, Tensor]]
    cases: Sequence[tuple[int, float]]
    package: str = "torch"


def _vit(rate: float, batch: int) -> tuple[nn.Module, Tensor]:
    """Six blocks of ViT-S on 64 patches and a class token."""
    return VisionTransformer(64, 8, 3, 384, 6, 6, CLASSES, rate), torch.randn(batch, 3, 64, 64)


def _channels(rate: float, batch: int) -> tuple[nn.Module, Tensor]:
    """Dropout of 256 channels before a convolution of 3x3, on 32 x 32 positions."""
    model = nn.Sequential(
        nn.Conv2d(3, 256, 1),
        nn.Dropout2d(rate),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, CLASSES),
    )
    return model, torch.randn(batch, 3, 32, 32)


def _deit(rate: float, batch: int) -> tuple[nn.Module, Tensor]:
    """timm's DeiT-III S/16, whose rate is the same in all blocks."""
    define_operators()
    from timm.layers import DropPath
    from timm.models.deit import deit3_small_patch16_224

    model = deit3_small_patch16_224(num_classes=CLASSES)
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    return model, torch.randn(batch, 3, 224, 224)


def _convnext(rate: float, batch: int) -> tuple[nn.Module, Tensor]:
    """torchvision's ConvNeXt-T, whose rate rises linearly from block to block."""
    define_operators()
    from torchvision.models import convnext_tiny

    return convnext_tiny(num_classes=CLASSES, stochastic_depth_prob=rate), torch.randn(batch, 3, 224, 224)


def _swin(rate: float, batch: int) -> tuple[nn.Module, Tensor]:
    """torchvision's Swin-T, whose rate rises linearly from block to block."""
    define_operators()
    from torchvision.models import SwinTransformer

    sizes: dict[str, Any] = {"patch_size": [4, 4], "window_size": [7, 7], "embed_dim": 96}
    shape: dict[str, Any] = {"depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
    model = SwinTransformer(**sizes, **shape, stochastic_depth_prob=rate, num_classes=CLASSES)
    return model, torch.randn(batch, 3, 224, 224)


NETS = {
    "vit": Net(_vit, ((32, 0.05), (32, 0.1), (32, 0.3), (32, 0.45), (8, 0.3))),
    "channels": Net(_channels, ((16, 0.1), (16, 0.3), (16, 0.5))),
    "deit3_small": Net(_deit, ((8, 0.45),), "timm"),
    "convnext_tiny": Net(_convnext, ((8, 0.4),), "torchvision"),
    "swin_t": Net(_swin, ((8, 0.4),), "torchvision"),
}
"""Name -> model; those of other packages need the extra `models`."""


def cases(nets: Sequence[str] | None, batches: Sequence[int] | None, rates: Sequence[float] | None) -> list[Case]:
    """The nets' own cases, with other batches or rates where these are given; by default of all that can run here.

    Raises:
        InvalidOption: a net is named whose package is not installed.
    """
    for name in nets or ():
        if find_spec(NETS[name].package) is None:
            raise InvalidOption(f"nets: {name!r} needs the package {NETS[name].package} (pip install 'dropfx[models]')")
    found = dict[Case, None]()
    for name in nets or [name for name, net in NETS.items() if find_spec(net.package) is not None]:
        for batch, rate in NETS[name].cases:
            found.update((Case(name, b, r), None) for b in batches or (batch,) for r in rates or (rate,))
    return list(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dropfx bench rows`."""
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), help="default: all whose package is installed")
    parser.add_argument("--batch", nargs="+", type=arguments.positive, help="batch sizes, in place of the nets' own")
    steps.add_arguments(parser, "rows", rounds=9, rates=None, baselines=(steps.EAGER,))


@malloc.tuned
def main(args: argparse.Namespace) -> int:
    """Runs the benchmark, prints its tables and writes JSON, Markdown and a chart. Returns the exit status."""
    chosen, console = cases(args.nets, args.batch, args.rates), Console()
    with console.status("") as status:
        results = steps.measure_all(chosen, args, console, status)
    steps_report.show_and_write(console, "rows", results, args)
    return 0
