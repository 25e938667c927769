"""Models by the kinds of modules in them: norms, channel dropouts, subclasses, frozen, parametrized, recurrent."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.catalogue.case import case, mlp, vectors


def images(*shape: int) -> Any:
    return lambda batch, draw: (draw(batch, *shape),)


@case("batch_norm_before", rewritten=("3",), batches=(4, 4, 3))
def batch_norm_before() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, 16))


@case("batch_norm_after", left=("1",))
def batch_norm_after() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.Dropout(0.5), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 16))


@case("batch_norm_after_linear", optional=("1",))
def batch_norm_after_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.Dropout(0.5), nn.Linear(96, 64), nn.BatchNorm1d(64), nn.Tanh())


@case("batch_norm_aside", rewritten=("drop",))
class BatchNormAside(nn.Module):
    """Batch statistics of the value before the dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.norm, self.drop, self.lin2 = (
            nn.Linear(64, 96),
            nn.BatchNorm1d(96),
            nn.Dropout(0.5),
            nn.Linear(96, 8),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.lin1(x)
        return self.lin2(self.drop(h)), self.norm(h)


@case("group_norm_before", rewritten=("2",))
def group_norm_before() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.GroupNorm(4, 96), nn.Dropout(0.5), nn.Linear(96, 16))


@case("alexnet", images(3, 32, 32), rewritten=("classifier.0", "classifier.3"), batches=(2, 3))
class AlexNetLike(nn.Module):
    """torchvision's AlexNet, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((4, 4))
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(8 * 4 * 4, 96),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(96, 64),
            nn.ReLU(inplace=True),
            nn.Linear(64, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


@case("vgg16", images(3, 16, 16), rewritten=("classifier.2", "classifier.5"), batches=(2, 3))
class VGGLike(nn.Module):
    """torchvision's VGG16, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2, 2)
        )
        self.avgpool = nn.AdaptiveAvgPool2d((4, 4))
        self.classifier = nn.Sequential(
            nn.Linear(8 * 4 * 4, 96),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(96, 96),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(96, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


@case("dropout2d_flatten", images(3, 4, 4), rewritten=("2",))
def dropout2d_flatten() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(1024, 16))


@case("dropout2d_conv", images(3, 4, 4), optional=("1",))
def dropout2d_conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 1), nn.Dropout2d(0.5), nn.Conv2d(64, 8, 3), nn.Flatten(), nn.Linear(32, 4))


@case("dropout1d_flatten", vectors(5, 64), rewritten=("0",))
def dropout1d_flatten() -> nn.Module:
    return nn.Sequential(nn.Dropout1d(0.5), nn.Flatten(), nn.Linear(320, 16))


@case("dropout1d_linear", vectors(64, 64), optional=("1",))
def dropout1d_linear() -> nn.Module:
    """The dropped channels are the rows of the Linear, not its units."""
    return nn.Sequential(nn.Linear(64, 64), nn.Dropout1d(0.5), nn.Linear(64, 16))


@case("dropout_after_conv", images(3, 4, 4), optional=("1",))
def dropout_after_conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 1), nn.Dropout(0.5), nn.Flatten(), nn.Linear(1024, 16))


@case("features_flatten_dropout", images(3, 4, 4), rewritten=("2",))
def features_flatten_dropout() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, 16))


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input) + 1.0


@case("linear_subclass_after", rewritten=("1",))
def linear_subclass_after() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.Dropout(0.5), ScaledLinear(96, 16))


@case("linear_subclass_both", optional=("1",))
def linear_subclass_both() -> nn.Module:
    return nn.Sequential(ScaledLinear(64, 96), nn.Dropout(0.5), ScaledLinear(96, 16))


class PlainSubclass(nn.Dropout):
    """The same dropout under another type."""


class HalvingDropout(nn.Dropout):
    """Not random at all."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * input if self.training else input


@case("dropout_subclass", optional=("2", "2:dropout_1"))
def dropout_subclass() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), PlainSubclass(0.5), nn.Linear(96, 16))


@case("dropout_subclass_not_random", rewritten=("5",), left=("2",))
def dropout_subclass_not_random() -> nn.Module:
    layers = [nn.Linear(64, 96), nn.ReLU(), HalvingDropout(0.5), nn.Linear(96, 96), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(96, 16))


@case("alpha_dropout", rewritten=("5",), left=("2",))
def alpha_dropout() -> nn.Module:
    layers = [nn.Linear(64, 96), nn.SELU(), nn.AlphaDropout(0.5), nn.Linear(96, 96), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(96, 16))


def frozen(*names: str) -> nn.Module:
    model = mlp(64, 96, 96, 16)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


FROZEN = {
    "first_weight": ("0.weight",),
    "middle_weight": ("3.weight",),
    "last_weight": ("6.weight",),
    "middle_bias": ("3.bias",),
    "middle": ("3.weight", "3.bias"),
    "biases": ("0.bias", "3.bias", "6.bias"),
    "all": ("0.weight", "0.bias", "3.weight", "3.bias", "6.weight", "6.bias"),
}
for name, parameters in FROZEN.items():
    build = functools.partial(frozen, *parameters)
    case(f"frozen_{name}", rewritten=("2", "5"))(build)
    case(f"frozen_{name}_and_input", rewritten=("2", "5"), input_grad=False)(build)


def parametrized(wrap: Any, index: int) -> nn.Module:
    model = mlp(64, 96, 96, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrap(model[index])
    return model


WRAPS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm_by_hook": nn.utils.weight_norm,
    "spectral_norm_by_hook": nn.utils.spectral_norm,
    "pruned": functools.partial(prune.random_unstructured, name="weight", amount=0.5),
}
for name, wrap in WRAPS.items():
    # the other dropout has two plain Linears around it or one
    case(f"{name}_first", rewritten=("2", "5"))(functools.partial(parametrized, wrap, 0))
    case(f"{name}_middle", rewritten=("2", "5"))(functools.partial(parametrized, wrap, 3))


@case("bilinear_and_bag", lambda b, draw: (draw.ints(50, b, 4), draw(b, 64)), rewritten=("drop",))
class BagAndBilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.bilinear = nn.EmbeddingBag(50, 64, mode="sum"), nn.Bilinear(64, 64, 64)
        self.drop, self.lin = nn.Dropout(0.5), nn.Linear(64, 16)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.lin(self.drop(self.bilinear(self.bag(ids), x)))


@case("functional_linear", rewritten=(":dropout_1",))
class FunctionalLinear(nn.Module):
    """`F.linear` on the module's own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(0.1 * torch.randn(96, 64)), nn.Parameter(0.1 * torch.randn(16, 96))
        self.bias = nn.Parameter(torch.zeros(96))

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(F.linear(x, self.w1, self.bias)), training=self.training)
        return F.linear(h, weight=self.w2)


@case("matmul_weight", optional=(":dropout_1",))
class MatmulWeight(FunctionalLinear):
    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.addmm(self.bias, x, self.w1.t()), training=self.training)
        return h @ self.w2.t()


@case("masked_weight", optional=("drop",))
class MaskedWeight(FunctionalLinear):
    """Dropout on the weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.drop(self.w1))), self.w2)


@case("root_is_dropout", optional=("",))
def root_is_dropout() -> nn.Module:
    return nn.Dropout(0.5)


@case("no_site_at_all")
def no_site_at_all() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


@case("odd_widths", vectors(37), rewritten=("2", "5"))
def odd_widths() -> nn.Module:
    return mlp(37, 101, 67, 5, p=0.4)
