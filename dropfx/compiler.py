"""The eager front end: dropfx.compile swaps a model's class in place, as FSDP2's fully_shard does.

The swapped class' forward looks up a specialisation for the call and runs it, or the original forward where nothing
drops or the forward cannot be traced; in the latter case the children are compiled on their own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from dropfx.errors import InvalidInput, InvalidModel, NoDropoutWarning, PassError
from dropfx.options import make_options
from dropfx.pass_infra import Options
from dropfx.patterns import Pattern
from dropfx.runtime import runtime
from dropfx.sites import DROPOUT_MODULES, may_drop
from dropfx.specialise import Specialisation, key_of
from dropfx.tracing import TraceRefused

M = TypeVar("M", bound=nn.Module)

_CAPACITY = 16
"""Specialisations kept for a module; the least recently used go first."""
_SHAPES_CAPACITY = 8
"""Specialisations to exact sizes after which a module runs as written: each new size would trace anew."""


class State:
    """What a compiled module carries: its options and its specialisations.

    Attributes:
        own: compiled by the user, not as a part of a model.
        prefix: path of the module in the compiled model, "" or ending in a dot.
        opaque: why the forward runs as written, "" where it is traced.
    """

    def __init__(self, options: Options, prefix: str = "", own: bool = True, quiet: bool = False) -> None:
        self.options, self.prefix, self.own = options, prefix, own
        self.opaque = ""
        self.warned = quiet
        self.cache: OrderedDict[tuple[Any, ...], list[Specialisation]] = OrderedDict()
        self._modules: list[nn.Module] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return State(self.options, self.prefix, self.own)

    def __reduce__(self) -> Any:
        return State, (self.options, self.prefix, self.own)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward of a compiled module."""
        if not self._drops(module):
            return _original_forward(module, args, kwargs)
        if runtime.disabled:
            with runtime.keeping_all():
                return _original_forward(module, args, kwargs)
        with runtime.outermost():
            return self._call(module, args, kwargs)

    def _drops(self, module: nn.Module) -> bool:
        """Whether anything may drop: the module or any part of it is in training mode."""
        if module.training:
            return True
        if self._modules is None:
            self._modules = list(module.modules())
        return any(m.training for m in self._modules)

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs and all(type(a) is Tensor for a in args):
            leaves, spec = list(args), len(args)
        else:
            leaves, spec = pytree.tree_flatten((args, kwargs))  # type: ignore[assignment]
        key = None if self.opaque or _not_traceable_now() else key_of(leaves)
        if key is None:
            return self._as_written(module, args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        found = self.find((spec, *key), tensors)
        if found is None:
            try:
                found = self.specialise(module, args, kwargs, (spec, *key))
            except TraceRefused as refusal:
                return self._refused(module, args, kwargs, refusal.reason)
            except PassError as error:
                warnings.warn(f"dropfx.compile: {error}; the model runs as written", RuntimeWarning, stacklevel=5)
                return self._refused(module, args, kwargs, str(error))
        if not found.sites:
            self._warn_if_nothing_drops(found)
            return _original_forward(module, args, kwargs)
        return found(module, tensors)

    def find(self, key: tuple[Any, ...], tensors: list[Tensor]) -> Specialisation | None:
        """The specialisation that holds for this call, moved to the recent end."""
        for position, candidate in enumerate(self.cache.get(key, ())):
            if candidate.shapes is not None and candidate.shapes != [t.shape for t in tensors]:
                continue
            if candidate.holds():
                self.cache.move_to_end(key)
                if position:
                    self.cache[key].insert(0, self.cache[key].pop(position))
                return candidate
        return None

    def specialise(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: tuple[Any, ...]
    ) -> Specialisation:
        """Trace, transform and keep; adopt the children that stay calls."""
        exact = sum(s.shapes is not None for specs in self.cache.values() for s in specs)
        if exact >= _SHAPES_CAPACITY:
            raise TraceRefused("its forward uses sizes as numbers and they keep changing", "")
        made = Specialisation(module, self.prefix, self.options, args, kwargs, original_class)
        for path, reason in made.leaves.items():
            if reason:
                self._adopt(module.get_submodule(path), f"{self.prefix}{path}.")
        self.cache.setdefault(key, []).insert(0, made)
        while sum(map(len, self.cache.values())) > _CAPACITY:
            oldest = next(iter(self.cache))
            self.cache[oldest].pop()
            if not self.cache[oldest]:
                del self.cache[oldest]
        return made

    def _refused(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
        """The forward cannot be traced: compile the children, run it as written. An error of its own is the user's."""
        adopted = self._adopt_children(module, self.prefix)
        try:
            out = _original_forward(module, args, kwargs)
        except Exception:
            for child in adopted:
                _restore(child)
            raise
        self.opaque = reason
        return out

    def _as_written(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.opaque:
            self._adopt_children(module, self.prefix)
        return _original_forward(module, args, kwargs)

    def _adopt_children(self, module: nn.Module, prefix: str) -> list[nn.Module]:
        adopted = []
        for name, child in module.named_children():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                adopted += self._adopt_children(child, f"{prefix}{name}.")
            elif self._adopt(child, f"{prefix}{name}."):
                adopted.append(child)
        return adopted

    def _adopt(self, child: nn.Module, prefix: str) -> bool:
        """Compile a part of the model on its own, where something could be rewritten inside."""
        lone = type(child) in DROPOUT_MODULES or (next(child.children(), None) is None and not _user_code(child))
        if "_dropfx" in child.__dict__ or lone or not may_drop(child) or not _swappable(child):
            return False
        if parametrize.is_parametrized(child):  # its class is parametrize's, which edits it later
            return False
        _swap(child, State(self.options, prefix, own=False))
        return True

    def _warn_if_nothing_drops(self, found: Specialisation) -> None:
        if self.own and not self.warned and not found.context.sites and not any(found.leaves.values()):
            self.warned = True
            warnings.warn(_NOTHING_DROPS, NoDropoutWarning, stacklevel=6)


_NOTHING_DROPS = "dropfx.compile: the model has no dropout that is active in training; it is left as it was"


class Compiled:
    """Mixed into the class of a compiled module."""

    _dropfx_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._dropfx_original,), self.__dict__.copy()


def original_class(module: nn.Module) -> type:
    """The class that the user wrote."""
    cls = type(module)
    return cls._dropfx_original if issubclass(cls, Compiled) else cls


@functools.cache
def _compiled_class(cls: Any) -> Any:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get("_dropfx")
        if state is None:  # made by type(self)(...), as slicing a Sequential does
            return cls.forward(self, *args, **kwargs)
        return state.call(self, args, kwargs)

    names: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    made: type = metaclass(cls.__name__, (Compiled, cls), {**names, "forward": forward, "_dropfx_original": cls})
    return made


def _rebuild(cls: Any) -> nn.Module:
    compiled = _compiled_class(cls)
    made: nn.Module = compiled.__new__(compiled)
    return made


def _original_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module._dropfx_original.forward(module, *args, **kwargs)  # type: ignore[union-attr]


def _swap(module: nn.Module, state: State) -> None:
    module.__dict__["_dropfx"] = state
    module.__class__ = _compiled_class(original_class(module))


def _restore(module: nn.Module) -> None:
    for part in module.modules():
        state = part.__dict__.get("_dropfx")
        if state is not None and (part is module or not state.own):
            part.__class__ = original_class(part)
            del part.__dict__["_dropfx"]


def _not_traceable_now() -> bool:
    """Something around the call sees or replaces what a graph would bypass: hooks, parametrize.cached, torch.func."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
        or parametrize._cache_enabled
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _user_code(module: nn.Module) -> bool:
    return not original_class(module).__module__.startswith("torch.nn.")


def _swappable(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule) and "forward" not in module.__dict__


# -- the public face ------------------------------------------------------------------------------------------------


def compile(
    model: M,
    *,
    pattern: str | Pattern = "block",
    block: int | str = "auto",
    groups: int | str = 1,
    lowering: str = "auto",
    min_speedup: float = 1.05,
    example_inputs: tuple[Any, ...] | list[Any] | Tensor = (),
    example_kwargs: dict[str, Any] | None = None,
    **unknown: Any,
) -> M:
    """Stop `model` from paying for what its dropouts drop; in place, and returned.

    In training, the dropouts of the model draw structured patterns, and the Linears around them multiply kept units
    only. In eval the model runs as it was. Parameters, buffers, state_dict keys, hooks and isinstance are the same.

    Args:
        model: any `nn.Module`.
        pattern: "block", "slice", "row", "tile", or a pattern of `dropfx.patterns`. "tile" drops tiles of the weights
            behind a dropout (structured DropConnect) in place of units, and of weights that the model itself drops.
        block: units in a block, or "auto".
        groups: draws a batch, one for each of so many contiguous chunks of the leading axis; 1 shares one draw.
        lowering: "auto", "aten" or "triton".
        min_speedup: predicted speed-up from which a site is rewritten; 0 rewrites all that can be.
        example_inputs: inputs of a training call, to trace at once; else the first training call traces.
        example_kwargs: keyword inputs of that call.

    Raises:
        InvalidModel (TypeError): `model` is not a module that can be compiled.
        InvalidOption (ValueError): an option is unknown or not accepted.
        InvalidInput (ValueError): the example inputs do not fit the model.
    """
    if example_kwargs is not None and not isinstance(example_kwargs, dict):
        raise InvalidInput(f"example_kwargs: got {type(example_kwargs).__name__}, accepted is a dict of keyword inputs")
    options = make_options(pattern, block, groups, lowering, min_speedup, **unknown)
    _check_model(model)
    if not may_drop(model):
        warnings.warn(_NOTHING_DROPS, NoDropoutWarning, stacklevel=2)
        return model
    examples = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if examples or example_kwargs:
        check_inputs(model, examples, example_kwargs or {})
    _restore(model)
    _swap(model, State(options))
    if examples or example_kwargs:
        _specialise_now(model, examples, example_kwargs or {})
    return model


def restore(model: M) -> M:
    """Undo `dropfx.compile(model)` in place; returns the model. A model that is not compiled stays as it is.

    Raises:
        InvalidModel (TypeError): `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise InvalidModel(f"model: got {type(model).__name__}, accepted is a torch.nn.Module")
    _restore(model)
    return model


def trace_count() -> int:
    """Traces made by this process so far."""
    return runtime.traces


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidModel(f"model: got {type(model).__name__}, accepted is a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidModel(
            "model: got a ScriptModule, whose forward cannot be traced; compile the module before scripting"
        )
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise InvalidModel("model: got the wrapper of torch.compile; use torch.compile(dropfx.compile(model))")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers):
        name = type(model).__name__
        raise InvalidModel(f"model: got a {name} wrapper; compile what it wraps, dropfx.compile(model.module)")
    if "forward" in model.__dict__:
        raise InvalidModel("model: its instance has a `forward` of its own, which would hide the compiled one")


def check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise InvalidInput where the inputs do not fit the signature of model's forward."""
    try:
        inspect.signature(original_class(model).forward).bind(model, *args, **kwargs)  # type: ignore[attr-defined]
    except TypeError as error:
        raise InvalidInput(f"example_inputs: they do not fit {type(model).__name__}.forward: {error}") from None


def _specialise_now(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Trace with example inputs, as in training; the model's flags stay as they are."""
    flags = {module: module.training for module in model.modules()}
    state: State = model.__dict__["_dropfx"]
    model.train()
    try:
        plain = not kwargs and all(type(a) is Tensor for a in args)
        leaves, spec = (list(args), len(args)) if plain else pytree.tree_flatten((args, kwargs))
        key = key_of(leaves)
        if key is None:
            raise InvalidInput("example_inputs: accepted are tensors, plain Python values and containers of these")
        error = _fails_as_written(model, args, kwargs)
        if error is not None:
            raise InvalidInput(f"example_inputs: {type(model).__name__}.forward fails on them: {error}") from error
        with contextlib.suppress(TraceRefused):  # its parts are traced in the first training call
            state.specialise(model, args, kwargs, (spec, *key))
    except InvalidInput:
        _restore(model)
        raise
    finally:
        for module, training in flags.items():
            module.training = training


def _fails_as_written(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """The error that the original forward raises on these inputs, tried without a trace left on model or generator."""
    import copy

    trial = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    _restore(trial)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            trial(*args, **kwargs)
    except Exception as error:
        return error
    return None
