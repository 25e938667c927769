"""The oracle: a model run with every `dropout(x) := x * m`.

It shares no code with the library. It takes the original model and recorded masks (site name -> dense multiplier),
replaces `F.dropout` and its channel forms by the multiplication, runs nn.LSTM and its kin layer by layer where they
drop between layers, and names each call as the library's public face does: module path, `path#2` for a second call,
`path:dropout_1` for functional calls, `path.dropout[0]` behind the first layer of an nn.LSTM.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

Masks = dict[str, Tensor]

Arguments = tuple[Tensor, float, bool, bool]  # input, rate, whether it is live, whether in place


def functional_arguments(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Arguments:
    return input, p, training, inplace


DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DROPOUT_FUNCTIONS: dict[Callable[..., Any], Callable[..., Arguments]] = {
    F.dropout: functional_arguments,
    F.dropout1d: functional_arguments,
    F.dropout2d: functional_arguments,
    F.dropout3d: functional_arguments,
    torch.dropout: lambda input, p, train: (input, p, train, False),
    torch.dropout_: lambda input, p, train: (input, p, train, True),
}


BERNOULLI = (torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_)
"""Draws of masks that models make by hand, and divide by the probability."""
UNIFORM = (torch.rand, torch.rand_like)


@dataclasses.dataclass
class LayersCall:
    """Arguments of torch.lstm, torch.gru, torch.rnn_tanh and torch.rnn_relu by their names, for inputs not packed."""

    input: Tensor
    hx: Any  # [layers * directions, batch, *], for LSTM a pair
    params: Any  # of each layer and direction in turn
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    def layer(self, function: Callable[..., Any], index: int, x: Tensor) -> tuple[Tensor, ...]:
        """The output and the last states of one layer on its own input."""
        directions = 1 + self.bidirectional
        first, tensors = index * directions, len(self.params) // self.num_layers
        hx: Any = [h.narrow(0, first, directions) for h in ([self.hx] if isinstance(self.hx, Tensor) else self.hx)]
        own = list(self.params)[index * tensors :][:tensors]
        rest = (self.has_biases, 1, 0.0, self.train, self.bidirectional, self.batch_first)
        return function(x, hx[0] if isinstance(self.hx, Tensor) else hx, own, *rest)


RECURRENT_FUNCTIONS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class UnrecordedSite(AssertionError):
    """A live dropout for which no mask was recorded."""


class SitePaths:
    """Where a forward is: the module path, how often each module was called, the functional dropouts of each path."""

    def __init__(self, root: nn.Module) -> None:
        self.paths = WeakIdKeyDictionary({module: path for path, module in root.named_modules()})
        self.stack: list[tuple[str, nn.Module]] = []
        self.calls: Counter[str] = Counter()
        self.functional: Counter[str] = Counter()
        self.draws: Counter[str] = Counter()
        self.recurrent: Counter[str] = Counter()

    def enter(self, module: nn.Module, _args: Any) -> None:
        path = self.paths.get(module, "?")
        self.calls[path] += 1
        self.stack.append((path, module))

    def leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        self.stack.pop()

    def site_name(self) -> str:
        path, module = self.stack[-1]
        if type(module) in DROPOUT_MODULES:
            calls = self.calls[path]
            return path if calls == 1 else f"{path}#{calls}"
        self.functional[path] += 1
        return f"{path}:dropout_{self.functional[path]}"

    def draw_name(self, kind: str = "bernoulli") -> str:
        path, _ = self.stack[-1]
        self.draws[f"{path}:{kind}"] += 1
        return f"{path}:{kind}_{self.draws[f'{path}:{kind}']}"

    def gap_names(self, gaps: int) -> list[str]:
        """Of the dropouts behind the layers of the recurrent module that is running."""
        path, _ = self.stack[-1]
        self.recurrent[path] += 1
        names = [f"{path}.dropout[{gap}]" if path else f"dropout[{gap}]" for gap in range(gaps)]
        return names if self.recurrent[path] == 1 else [f"{name}#{self.recurrent[path]}" for name in names]


class ReplaceDropout(TorchFunctionMode):
    """`dropout(x) := x * masks[site]` for every live dropout; `left_alone` sites keep PyTorch's own."""

    def __init__(self, paths: SitePaths, masks: Masks, left_alone: Callable[[str], bool]) -> None:
        super().__init__()
        self.paths, self.masks, self.left_alone = paths, masks, left_alone
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BERNOULLI and (name := self.paths.draw_name()) in self.masks:
            self.used.add(name)
            return bernoulli(func, self.masks[name], *args, **kwargs)
        if func in UNIFORM and (name := self.paths.draw_name("rand")) in self.masks:
            self.used.add(name)
            # nothing is drawn: what draws behind it draws as in a model without it
            return uniform((torch.zeros if func is torch.rand else torch.zeros_like)(*args, **kwargs), self.masks[name])
        if func in RECURRENT_FUNCTIONS and len(args) == 9 and isinstance(args[2], (list, tuple)):
            return self.by_layers(func, LayersCall(*args))
        if func not in DROPOUT_FUNCTIONS:
            return func(*args, **kwargs)
        name = self.paths.site_name()
        x, p, training, inplace = DROPOUT_FUNCTIONS[func](*args, **kwargs)
        if name in self.masks:
            self.used.add(name)
            return multiply(x, self.masks[name], inplace, name)
        if not training or p in (0, 1) or self.left_alone(name):
            return func(*args, **kwargs)
        raise self.unrecorded(name, p)

    def by_layers(self, function: Callable[..., Any], call: LayersCall) -> tuple[Tensor, ...]:
        """A recurrent function with the masks of the gaps between its layers; whole where it drops nothing."""
        names = self.paths.gap_names(call.num_layers - 1)
        drops = call.train and call.dropout not in (0, 1)
        if not any(name in self.masks for name in names):
            unknown = [name for name in names if not self.left_alone(name)]
            if drops and unknown:
                raise self.unrecorded(unknown[0], call.dropout)
            return function(*(getattr(call, field.name) for field in dataclasses.fields(call)))
        x, last = call.input, []
        for index, name in enumerate([*names, None]):
            x, *state = call.layer(function, index, x)
            last.append(state)
            if name is not None:
                x = self.drop_between(x, name, call.dropout if drops else 0.0)
        return x, *(torch.cat(states) for states in zip(*last, strict=True))

    def drop_between(self, x: Tensor, name: str, p: float) -> Tensor:
        if name in self.masks:
            self.used.add(name)
            return multiply(x, self.masks[name], False, name)
        if p and not self.left_alone(name):
            raise self.unrecorded(name, p)
        return torch.dropout(x, p, True)

    def unrecorded(self, name: str, p: float) -> UnrecordedSite:
        return UnrecordedSite(f"site {name!r} (p={p}) is live and has no mask; recorded: {sorted(self.masks)}")


def bernoulli(func: Callable[..., Any], mask: Tensor, like: Tensor, p: float | None = None) -> Tensor:
    """What a recorded mask was before its division by p: ones and zeros, but for the drawn rate.

    Without p `like` holds the probabilities.
    """
    of_rows = mask.dim() > 1 and mask.size(-1) == 1
    drawn = (mask != 0 if of_rows else mask * (like if p is None else p)).to(like.dtype).expand(like.shape)
    return like.copy_(drawn) if func is Tensor.bernoulli_ else drawn


def uniform(like: Tensor, mask: Tensor) -> Tensor:
    """Numbers in [0, 1) that lie above any threshold for the rows that a mask keeps, which is how models keep them."""
    return (mask != 0).to(like.dtype).view(like.shape) * (1 - torch.finfo(like.dtype).eps)


def multiply(x: Tensor, mask: Tensor, inplace: bool, name: str) -> Tensor:
    """x * mask, rounded once to x's dtype; in place where the site is."""
    assert torch.broadcast_shapes(x.shape, mask.shape) == x.shape, f"{name}: mask {mask.shape} for x {x.shape}"
    if inplace:
        return x.mul_(mask)
    return (x * mask).to(x.dtype)


@contextlib.contextmanager
def replaced_dropout(
    model: nn.Module,
    masks: Masks,
    left_alone: Callable[[str], bool] = lambda name: False,
) -> Iterator[ReplaceDropout]:
    """Forwards of `model` inside run with the recorded masks; checkpoints run plainly, without a second forward."""
    paths = SitePaths(model)
    handles = [
        register_module_forward_pre_hook(paths.enter),
        register_module_forward_hook(paths.leave, always_call=True),
    ]
    try:
        plain = mock.patch.object(torch.utils.checkpoint, "checkpoint", plain_call)
        with plain, ReplaceDropout(paths, masks, left_alone) as mode:
            yield mode
    finally:
        for handle in handles:
            handle.remove()


def plain_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint` without the checkpoint.

    The reentrant kind makes no gradients where no argument asks for one, not of the parameters that it reads either.
    """
    own = {"use_reentrant", "context_fn", "determinism_check", "debug", "early_stop", "preserve_rng_state"}
    asked = any(isinstance(given, Tensor) and given.requires_grad for given in args)
    with torch.set_grad_enabled(torch.is_grad_enabled() and (asked or not kwargs.get("use_reentrant"))):
        return function(*args, **{name: value for name, value in kwargs.items() if name not in own})


@dataclasses.dataclass
class Outcome:
    """All that a training step of a model leaves behind, flattened to `path -> value`."""

    outputs: dict[str, Any]
    inputs: dict[str, Any]
    input_grads: dict[str, Any]
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    parameters: dict[str, Tensor]


def run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    around: contextlib.AbstractContextManager[Any] | None = None,
    input_grad: bool = True,
) -> Outcome:
    """One forward (inside `around`) and one backward with fixed cotangents; the caller's tensors are not touched."""
    args, kwargs = fresh((args, kwargs or {}), input_grad)
    model.zero_grad(set_to_none=True)
    with around or contextlib.nullcontext():
        output = model(*args, **kwargs)
    outputs, inputs = flatten(output), flatten((args, kwargs))
    terms = [
        (value.to(torch.float64) * cotangent(value, i)).sum()
        for i, value in enumerate(outputs.values())
        if isinstance(value, Tensor) and value.requires_grad
    ]
    if terms:
        torch.stack(terms).sum().backward()
    return Outcome(
        outputs={path: detached(value) for path, value in outputs.items()},
        inputs={path: detached(value) for path, value in inputs.items()},
        input_grads={path: value.grad for path, value in inputs.items() if isinstance(value, Tensor) and value.is_leaf},
        grads={path: parameter.grad for path, parameter in model.named_parameters()},
        buffers={path: buffer.clone() for path, buffer in model.named_buffers()},
        parameters={path: detached(parameter) for path, parameter in model.named_parameters()},
    )


def oracle_run(
    original: nn.Module,
    masks: Masks,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    left_alone: Callable[[str], bool] = lambda name: False,
    input_grad: bool = True,
) -> Outcome:
    """What a compiled model must leave behind, given draws of numbers of their own: what else is random draws alike."""
    set_seed(seed)
    replaced = replaced_dropout(original, masks, left_alone)
    return run(original, args, kwargs, around=replaced, input_grad=input_grad)


def set_seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)


def fresh(tree: Any, input_grad: bool) -> Any:
    """A deep copy; floating leaves require grad. One tensor given twice stays one tensor."""
    tree = copy.deepcopy(tree)
    for value in flatten(tree).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_(input_grad)
    return tree


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """`path -> leaf` of nested dicts, tuples, lists and dataclasses; the container's type is a leaf of its own."""
    if isinstance(tree, dict):
        children = [(f"{path}[{key!r}]", value) for key, value in tree.items()]
    elif isinstance(tree, (tuple, list)):
        children = [(f"{path}[{i}]", value) for i, value in enumerate(tree)]
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        children = [(f"{path}.{field.name}", getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    else:
        return {path: tree}
    flat: dict[str, Any] = {f"{path}<type>": type(tree)}
    for child, value in children:
        flat |= flatten(value, child)
    return flat


def detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def cotangent(value: Tensor, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(value.shape, generator=generator, dtype=torch.float64)
