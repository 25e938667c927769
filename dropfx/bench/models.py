"""The models of `dropfx bench compile`: MLPs, and other people's at their usual widths with few layers.

Each factory imports its package itself, so that one that is missing leaves out its own cases only.
"""

from __future__ import annotations

import copy
import fnmatch
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropfx.bench.training import mlp
from dropfx.errors import InvalidOption


class Built(NamedTuple):
    """A model with what a training step of it needs; `loss` takes what the model returns."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[[Any], Tensor]

    def copy(self) -> Built:
        """The same with a model of its own."""
        return self._replace(model=copy.deepcopy(self.model))


@dataclass(frozen=True)
class Case:
    """A model at a drop rate.

    Attributes:
        name: of the model and its batch size.
        rate: of all its dropouts but those on attention probabilities, which have it too where the model has one rate.
        build: rate -> the model and its inputs.
        package: what must be installed; None where PyTorch suffices.
        times_compilation: whether the seconds until its first step are measured too; one case a graph is enough.
    """

    name: str
    rate: float
    build: Callable[[float], Built]
    package: str | None = None
    times_compilation: bool = False

    @property
    def title(self) -> str:
        """Name and rate, such as bert-0.1: what `--cases` selects by."""
        return f"{self.name}-{self.rate:g}"

    def make(self) -> Built:
        """The model in training mode; the same weights and inputs each time."""
        define_operators()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = self.build(self.rate)
        built.model.train()
        return built


def available(cases: Sequence[Case]) -> tuple[list[Case], dict[str, list[str]]]:
    """The cases that can run here, and the titles of the others by the package that they lack."""
    found: list[Case] = []
    missing: dict[str, list[str]] = {}
    for case in cases:
        if case.package is None or importlib.util.find_spec(case.package) is not None:
            found.append(case)
        else:
            missing.setdefault(case.package, []).append(case.title)
    return found, missing


def chosen(patterns: Sequence[str] | None) -> list[Case]:
    """The cases whose title matches one of the patterns, such as `mlp-*`; all without patterns.

    Raises:
        InvalidOption: a pattern matches none.
    """
    if patterns is None:
        return list(CASES)
    titles = [case.title for case in CASES]
    for pattern in patterns:
        if not fnmatch.filter(titles, pattern):
            raise InvalidOption(f"cases: got {pattern!r}, accepted are patterns of {', '.join(titles)}")
    return [case for case in CASES if any(fnmatch.fnmatchcase(case.title, pattern) for pattern in patterns)]


_LIBRARIES: list[torch.library.Library] = []  # what a library defines is gone with its object


def define_operators() -> None:
    """Beside a CPU build of PyTorch torchvision's wheel lacks operators for which it then registers fakes."""
    if not _LIBRARIES and not hasattr(torch.ops.torchvision, "nms"):
        _LIBRARIES.append(torch.library.Library("torchvision", "DEF"))
        _LIBRARIES[0].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES[0].define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# -- losses ---------------------------------------------------------------------------------------------------------


def _classes(batch: int, count: int) -> Callable[[Any], Tensor]:
    labels = torch.randint(count, (batch,))
    return lambda outputs: F.cross_entropy(outputs, labels)


def _mean_square(outputs: Any) -> Tensor:
    return torch.mean(outputs.square())


def _own_loss(outputs: Any) -> Tensor:
    loss: Tensor = outputs.loss
    return loss


# -- factories ------------------------------------------------------------------------------------------------------


def _mlp(sizes: tuple[int, ...], batch: int, rate: float) -> Built:
    return Built(mlp(sizes, rate), (torch.randn(batch, sizes[0]),), {}, _classes(batch, sizes[-1]))


def _rtdl_mlp(rate: float) -> Built:
    from rtdl_revisiting_models import MLP

    model = MLP(d_in=16, d_out=1, n_blocks=3, d_block=1024, dropout=rate)
    return Built(model, (torch.randn(1024, 16),), {}, _mean_square)


def _rtdl_resnet(rate: float) -> Built:
    from rtdl_revisiting_models import ResNet

    sizes: dict[str, Any] = {"n_blocks": 4, "d_block": 512, "d_hidden": None, "d_hidden_multiplier": 2.0}
    model = ResNet(d_in=16, d_out=1, dropout1=rate, dropout2=rate, **sizes)
    return Built(model, (torch.randn(512, 16),), {}, _mean_square)


def _mixer(rate: float) -> Built:
    """MLP-Mixer B/16, two of its twelve blocks."""
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(
        num_classes=10, img_size=224, patch_size=16, num_blocks=2, embed_dim=768, proj_drop_rate=rate, drop_rate=rate
    )
    return Built(model, (torch.randn(4, 3, 224, 224),), {}, _classes(4, 10))


def _bert(rate: float) -> Built:
    """BERT base, two of its twelve layers, with a vocabulary of 8,192."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=8192, num_hidden_layers=2, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate
    )
    return _of_tokens(BertForMaskedLM(config))


def _t5(rate: float) -> Built:
    """T5 small, two of its six layers on each side, with a vocabulary of 8,192."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=8192, num_layers=2, dropout_rate=rate, use_cache=False, decoder_start_token_id=0)
    return _of_tokens(T5ForConditionalGeneration(config))


def _of_tokens(model: nn.Module) -> Built:
    tokens = torch.randint(8192, (4, 128))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    return Built(model, (), inputs, _own_loss)


def _t5_feed_forward(rate: float) -> Built:
    """Two feed-forward blocks of T5 small, 512 -> 2048 -> 512, on 8 x 128 tokens."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5LayerFF

    model = nn.Sequential(*(T5LayerFF(T5Config(dropout_rate=rate)) for _ in range(2)))
    return Built(model, (torch.randn(8, 128, 512),), {}, _mean_square)


def _vgg16(rate: float) -> Built:
    """VGG16; the pooling before its classifier makes the usual 512 x 7 x 7 features of any image."""
    from torchvision.models import vgg16

    return Built(vgg16(num_classes=10, dropout=rate), (torch.randn(32, 3, 32, 32),), {}, _classes(32, 10))


# -- the table ------------------------------------------------------------------------------------------------------


def _mlps() -> list[Case]:
    small, large = (784, 2048, 2048, 10), (784, 4096, 4096, 10)
    return [
        Case(
            f"mlp-{sizes[1]}-{batch}",
            rate,
            partial(_mlp, sizes, batch),
            None,
            (sizes, batch, rate) == (small, 128, 0.5),
        )
        for sizes, batch in ((small, 128), (small, 1024), (large, 1024))
        for rate in (0.3, 0.5, 0.7)
    ]


CASES: tuple[Case, ...] = (
    *_mlps(),
    Case("rtdl_mlp", 0.5, _rtdl_mlp, "rtdl_revisiting_models", True),
    Case("mixer", 0.3, _mixer, "timm", True),
    Case("t5_ff", 0.3, _t5_feed_forward, "transformers", True),
    Case("bert", 0.1, _bert, "transformers", True),
    Case("t5", 0.1, _t5, "transformers", True),
    Case("mixer", 0.1, _mixer, "timm"),
    Case("rtdl_mlp", 0.1, _rtdl_mlp, "rtdl_revisiting_models"),
    Case("rtdl_resnet", 0.1, _rtdl_resnet, "rtdl_revisiting_models", True),
    Case("vgg16", 0.1, _vgg16, "torchvision", True),
)
