"""What a forward may take and return: optional and plain arguments, structures, shapes read in Python."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.catalogue.case import case, mlp, vectors
from tests.catalogue.python import SITE, WithMLP


@case("isinstance", rewritten=SITE)
class IsInstance(WithMLP):
    def forward(self, x: Any) -> Tensor:
        if isinstance(x, torch.Tensor):
            return self.head(self.mlp(x))
        return self.head(x)


@case("training_branch", rewritten=SITE)
class TrainingBranch(WithMLP):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.mlp(x)
        return (self.head(h), h) if self.training else self.head(h)


class Optional(WithMLP):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: bool = False, times: int = 1, mode: str = "add"
    ) -> Tensor:
        h = self.mlp(x)
        if mask is not None:
            h = h * mask
        if scale:
            h = h * 0.5
        for _ in range(times):
            h = torch.tanh(h)
        return self.head(h + x if mode == "add" else h * x)


case("argument_missing", rewritten=SITE)(Optional)
case("argument_none", lambda b, draw: (draw(b, 64), None), rewritten=SITE)(Optional)
case("argument_given", lambda b, draw: (draw(b, 64), draw(b, 1)), rewritten=SITE)(Optional)
case("argument_bool", lambda b, draw: (draw(b, 64), None, True), rewritten=SITE)(Optional)
case("argument_int", lambda b, draw: (draw(b, 64), None, False, 3), rewritten=SITE)(Optional)
case("argument_str", lambda b, draw: (draw(b, 64), None, False, 0, "times"), rewritten=SITE)(Optional)
case("argument_keywords", kwargs=lambda b, draw: {"mode": "times", "mask": draw(64), "times": 2}, rewritten=SITE)(
    Optional
)
case("only_keywords", lambda b, draw: (), kwargs=lambda b, draw: {"scale": True, "x": draw(b, 64)}, rewritten=SITE)(
    Optional
)


@case("variadic", lambda b, d: (d(b, 64), d(b, 64)), kwargs=lambda b, d: {"gain": d(64), "power": 2}, rewritten=SITE)
class Variadic(WithMLP):
    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        return self.head(self.mlp(sum(inputs) * options["gain"]) ** options["power"])


@case("float_argument", lambda b, draw: (draw(b, 64), 0.25), rewritten=SITE)
class FloatArgument(WithMLP):
    def forward(self, x: Tensor, weight: float) -> Tensor:
        return self.head(self.mlp(x) * weight)


@case("dict_in_and_out", lambda b, draw: ({"x": draw(b, 64), "extra": None},), rewritten=SITE)
class DictInOut(WithMLP):
    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        h = self.mlp(batch["x"])
        return {"logits": self.head(h), "hidden": [h, (h.sum(), 3)], "extra": batch["extra"], "name": "dict"}


@case("tuple_in_and_out", lambda b, draw: ((draw(b, 64), [draw(b, 64), 2]),), rewritten=SITE)
class TupleInOut(WithMLP):
    def forward(self, pair: tuple[Any, Any]) -> tuple[Any, ...]:
        x, (y, times) = pair
        return self.head(self.mlp(x + times * y)), None, [x * 2.0], True


Pair = namedtuple("Pair", ["logits", "hidden"])


@case("namedtuple_out", rewritten=SITE)
class NamedTupleOut(WithMLP):
    def forward(self, x: Tensor) -> Pair:
        h = self.mlp(x)
        return Pair(self.head(h), hidden=h)


@dataclasses.dataclass
class ModelOutput:
    logits: Tensor
    loss: Tensor | None = None
    names: tuple[str, ...] = ()


@case("dataclass_out", rewritten=SITE)
class DataclassOut(WithMLP):
    def forward(self, x: Tensor) -> ModelOutput:
        h = self.head(self.mlp(x))
        return ModelOutput(h, loss=h.square().sum(), names=("a", "b"))


@case("len_of_shape", vectors(64, 3), rewritten=SITE)
class LenOfShape(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        if len(x.shape) == 3:
            x = x.flatten(0, 1)
        assert x.dim() == 2, f"got {x.dim()} dimensions"
        return self.head(self.mlp(x))


@case("shape_unpacked", vectors(64, 3), rewritten=SITE)
class ShapeUnpacked(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        h = self.mlp(x.reshape(B * T, C)).view(B, T, -1)
        return self.head(h) + torch.arange(T, device=x.device).to(x.dtype)[:, None] + x.new_zeros(B, 1, 1)


@case("batch_branch", rewritten=SITE, batches=(4, 3, 2, 1, 5))
class BatchBranch(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)
        if x.size(0) > 2:
            h = 2.0 * h
        return self.head(h) / x.shape[0]


@case("length_loop", vectors(64, 3), rewritten=("mlp.2", "mlp.2#2", "mlp.2#3"))
class LengthLoop(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(self.mlp(x[:, t])) for t in range(x.size(1))], 1)


@case("module_loops", rewritten=("layers.0.2", "layers.1.2", "named.a.2", "named.b.2"))
class ModuleLoops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp(64, 96, 64) for _ in range(2))
        self.named = nn.ModuleDict({"a": mlp(64, 96, 64), "b": mlp(64, 96, 64)})

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) + i
        return sum(layer(x) for layer in self.named.values())


@case("unregistered_module", rewritten=SITE)
class Unregistered(WithMLP):
    """A module kept in a plain list: no path, no parameters of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Tanh()]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden[0](self.mlp(x)))


@case("constants_inside", rewritten=SITE)
class ConstantsInside(WithMLP):
    scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        pad = torch.ones(64, dtype=x.dtype) * self.scale + torch.tensor(0.5, dtype=x.dtype)
        return self.head(self.mlp(x * pad) + torch.zeros_like(x))


@case("try_inside", rewritten=SITE)
class TryInside(WithMLP):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.head(self.mlp(x))
        except ValueError:
            return self.head(x)


@case("custom_function", rewritten=SITE)
class CustomFunction(WithMLP):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2.0 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2.0 * grad

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(self.Double.apply(x)))


@case("functional_off", rewritten=SITE)
class FunctionalOff(WithMLP):
    """Functional dropouts with a constant switch and a rate of zero are no sites."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.mlp(x), 0.5, training=False)
        return self.head(F.dropout(h, 0.0, self.training))
