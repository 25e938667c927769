"""The oracle of the fuzzer: plain PyTorch with `dropout(x) := x * recorded mask`.

It shares nothing with `dropfx.testing` and `tests.oracle`, so that one mistake cannot hide in both. Sites that were not
recorded draw from PyTorch's generator; a draw of dropfx leaves that as it was, so both models draw alike.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

Masks = dict[str, Tensor]
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DRAWS = (torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_)
RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
PRODUCTS = (F.linear, F.conv1d, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__)


class Masked(TorchFunctionMode):
    """Names each site as the public face does, and multiplies by its mask.

    With `digits`, each product is off by about that, relatively, as if it had been rounded otherwise.
    """

    def __init__(self, model: nn.Module, masks: Masks, tiles: bool, digits: float = 0.0) -> None:
        super().__init__()
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.root, self.masks, self.tiles = model, masks, tiles
        self.stack: list[nn.Module] = []
        self.count: Counter[str] = Counter()
        self.used: set[str] = set()
        self.tiled: list[tuple[Tensor, list[Tensor]]] = []
        self.digits, self.noise = digits, torch.Generator().manual_seed(0)

    @property
    def path(self) -> str:
        return self.paths.get(id(self.stack[-1] if self.stack else self.root), "?")

    def numbered(self, kind: str) -> int:
        self.count[kind] += 1
        return self.count[kind]

    def mask(self, name: str) -> Tensor | None:
        found = self.masks.get(name)
        self.used |= {name} if found is not None else set()
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return self.dropout(func, *args, **kwargs)
        if func in DRAWS:
            return self.bernoulli(func, *args, **kwargs)
        if func is torch.rand:
            return self.uniform(func, *args, **kwargs)
        if func in RECURRENT and isinstance(args[2], (list, tuple)):
            return self.recurrent(func, *args)
        made = self.linear(*args, **kwargs) if func is F.linear and self.tiled else func(*args, **kwargs)
        if self.digits and func in PRODUCTS:
            made = made * (1 + self.digits * torch.randn(made.shape, generator=self.noise, dtype=made.dtype))
        return made

    def dropout(
        self, func: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if self.stack and type(self.stack[-1]) in MODULES:
            calls = self.numbered(self.path)
            name = self.path if calls == 1 else f"{self.path}#{calls}"
        else:
            name = f"{self.path}:dropout_{self.numbered(f'{self.path}:')}"
        weights = self.tile_masks(name) if self.tiles else []
        if weights:
            dropped = input if inplace else input.view_as(input)
            self.tiled.append((dropped, weights))
            return dropped
        mask = self.mask(name)
        if mask is None:
            return func(input, p, training, inplace)
        return input.mul_(mask.to(input.dtype)) if inplace else (input * mask).to(input.dtype)

    def tile_masks(self, name: str) -> list[Tensor]:
        names = [name, *(f"{name}[{k}]" for k in range(len(self.masks)))]
        return [mask for each in names if (mask := self.mask(each)) is not None]

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for dropped, masks in self.tiled:
            # the product of a Linear that nobody reads drops nothing
            if (input is dropped or weight is dropped) and masks and masks[0].shape == weight.shape:
                weight = weight * masks.pop(0).to(weight.dtype)
        return F.linear(input, weight, bias)

    def bernoulli(self, func: Any, input: Tensor, p: Any = None, **kwargs: Any) -> Tensor:
        """A recorded mask was divided by the probability of a one."""
        mask = self.mask(f"{self.path}:bernoulli_{self.numbered(f'{self.path}:bernoulli')}")
        if mask is None:
            return func(input, *(() if p is None else (p,)), **kwargs)
        drawn = mask != 0 if of_rows(mask) else mask * (input if p is None else p)
        drawn = drawn.to(input.dtype).expand(input.shape)
        return input.copy_(drawn) if func is Tensor.bernoulli_ else drawn.to(input.dtype)

    def uniform(self, func: Any, *sizes: Any, **kwargs: Any) -> Tensor:
        """The programs keep a row where its number is high."""
        mask = self.mask(f"{self.path}:rand_{self.numbered(f'{self.path}:rand')}")
        if mask is None:
            return func(*sizes, **kwargs)
        like = torch.zeros(*sizes, **kwargs)
        return (mask != 0).to(like.dtype).view(like.shape) * 0.999

    def recurrent(self, func: Any, x: Tensor, hx: Any, weights: Any, *rest: Any) -> tuple[Tensor, ...]:
        biases, layers, p, train, both, batch_first = rest
        calls, path = self.numbered(f"{self.path} recurrent"), self.path
        names = [f"{path}.dropout[{k}]" + ("" if calls == 1 else f"#{calls}") for k in range(layers - 1)]
        if layers == 1 or not train or p == 0:
            return func(x, hx, weights, *rest)
        each, states, last = len(weights) // layers, [hx] if isinstance(hx, Tensor) else list(hx), []
        for k in range(layers):
            own = [state.chunk(layers)[k] for state in states]
            given = own[0] if isinstance(hx, Tensor) else own
            part = list(weights[k * each : (k + 1) * each])
            x, *out = func(x, given, part, biases, 1, 0.0, train, both, batch_first)
            last.append(out)
            if k < layers - 1:
                mask = self.mask(names[k])
                x = F.dropout(x, p, train) if mask is None else x * mask
        return x, *(torch.cat(parts) for parts in zip(*last, strict=True))


@contextlib.contextmanager
def masked(model: nn.Module, masks: Masks, tiles: bool, digits: float = 0.0) -> Iterator[Masked]:
    """Calls of the model inside are the oracle's."""
    mode = Masked(model, masks, tiles, digits)

    def enter(module: nn.Module, _args: Any) -> None:
        mode.stack.append(module)

    def leave(module: nn.Module, _args: Any, _output: Any) -> None:
        mode.stack.pop()

    def uncheckpointed(function: Callable[..., Any], *args: Any, use_reentrant: bool) -> Any:
        asked = any(isinstance(given, Tensor) and given.requires_grad for given in args)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (asked or not use_reentrant)):
            return function(*args)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with mock.patch.object(torch.utils.checkpoint, "checkpoint", uncheckpointed), mode:
            yield mode
    finally:
        for handle in handles:
            handle.remove()


class Raised(NamedTuple):
    """A step ended by an exception, in its "forward" or "backward"."""

    stage: str
    error: Exception


Outcome = dict[str, Tensor | None] | Raised


def train_step(
    call: Callable[..., tuple[Tensor, ...]],
    model: nn.Module,
    inputs: dict[str, Tensor],
    around: contextlib.AbstractContextManager[Any],
    second_order: bool,
    seed: int,
) -> Outcome:
    """Forward and backward with fixed cotangents: outputs, all gradients, parameters and buffers by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    stage = "forward"
    try:
        with around:
            outputs = call(**inputs)
        # written to later, an output that is a parameter or an input would not be what it was
        found: dict[str, Tensor | None] = {f"output {k}": v.detach().clone() for k, v in enumerate(outputs)}
        stage = "backward"
        _backward(outputs, inputs, second_order)
    except Exception as error:
        return Raised(stage, error)
    found |= {f"gradient of {name}": value.grad for name, value in inputs.items()}
    found |= {f"gradient of {name}": value.grad for name, value in model.named_parameters()}
    found |= {f"buffer {name}": value.clone() for name, value in model.named_buffers()}
    return found


def _backward(outputs: tuple[Tensor, ...], inputs: dict[str, Tensor], second_order: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    terms = []
    for value in outputs:
        cotangent = torch.randn(value.shape, generator=draw, dtype=torch.float64)
        if value.requires_grad:
            terms.append((value.double() * cotangent).sum() / max(1, value.numel()) ** 0.5)
    if not terms:
        return
    loss = torch.stack(terms).sum()
    if second_order:
        floats = [value for value in inputs.values() if value.requires_grad]
        gradients = torch.autograd.grad(loss, floats, create_graph=True, allow_unused=True)
        penalties = [g.double().square().sum() for g in gradients if g is not None and g.requires_grad]
        loss = torch.stack([loss, *penalties]).sum()
    loss.backward()


def differences(actual: Outcome, expected: Outcome, tolerance: float) -> list[str]:
    """One line for each tensor that differs, measured by its norm; a small one against the largest of its kind."""
    assert isinstance(actual, dict)
    assert isinstance(expected, dict)
    lines = [f"{name}: only one of the two has it" for name in actual.keys() ^ expected.keys()]
    largest: dict[str, float] = {}
    for name, value in expected.items():
        kind = name.split()[0]
        largest[kind] = max(largest.get(kind, 0.0), _size(value))
    for name in actual.keys() & expected.keys():
        if line := _difference(actual[name], expected[name], tolerance, 1e-3 * max(1.0, largest[name.split()[0]])):
            lines.append(f"{name}: {line}")
    return sorted(lines)


def _difference(actual: Tensor | None, expected: Tensor | None, tolerance: float, floor: float) -> str:
    if actual is None or expected is None:
        present = expected if actual is None else actual  # no gradient and one of zeros say the same
        same = present is None or _size(present) <= tolerance * floor
        return "" if same else f"{'none' if actual is None else 'a tensor'} where the other is not"
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    if not actual.is_floating_point():
        return "" if torch.equal(actual, expected) else "integers differ"
    error = float((actual.double() - expected.double()).norm())
    scale = max(_size(expected), floor)
    return "" if error <= tolerance * scale else f"error {error:.3g} at size {scale:.3g}"


def _size(value: Tensor | None) -> float:
    return 0.0 if value is None or not value.is_floating_point() else float(value.detach().double().norm())


def finite(outcome: Outcome) -> bool:
    tensors = [] if isinstance(outcome, Raised) else [v for v in outcome.values() if v is not None]
    return all(bool(torch.isfinite(v).all()) for v in tensors)


def merged(frames: list[Masks]) -> Masks | None:
    """The masks of one forward; None where two graphs of it gave two sites one name."""
    names = [name for frame in frames for name in frame]
    numbered = any(re.search(r":\w+_\d+$|#\d+$", name) for name in names)
    if len(set(names)) < len(names) or (len(frames) > 1 and numbered):
        return None
    return {name: mask for frame in frames for name, mask in frame.items()}


def of_rows(mask: Tensor) -> bool:
    """Whether a mask has one value a sample."""
    return mask.dim() > 1 and mask.size(-1) == 1
