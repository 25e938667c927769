"""A compiled module: the swapped class, and the state that answers its calls.

The swapped class' forward looks up a specialisation for the call and runs it, or the original forward where nothing
drops or the forward cannot be traced; in the latter case the children are compiled on their own.
"""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from dropfx.errors import NoDropoutWarning, PassError
from dropfx.packed import opened
from dropfx.pass_infra import Options
from dropfx.runtime import runtime
from dropfx.sharding import TENSOR_PARALLEL, tensor_parallel
from dropfx.sites import DROPOUT_MODULES, makes_masks, may_drop
from dropfx.specialise import Specialisation, key_of
from dropfx.tracing import TraceRefused
from dropfx.tracing.recurrent import RECURRENT_MODULES

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
        self._mentions_masks: bool | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return State(self.options, self.prefix, self.own)

    def __reduce__(self) -> Any:
        return State, (self.options, self.prefix, self.own)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward of a compiled module."""
        if not self._drops(module):
            return _original_forward(module, args, kwargs)
        if torch.compiler.is_dynamo_compiling():  # it would capture the search for a specialisation, and lose the draws
            from dropfx.uncaptured import uncaptured

            return uncaptured(self._run, module, args, kwargs)
        return self._run(module, args, kwargs)

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if runtime.disabled:
            return (self._call if self._makes_masks(module) else _original_forward)(module, args, kwargs)
        with runtime.outermost():
            return self._call(module, args, kwargs)

    def _drops(self, module: nn.Module) -> bool:
        """Whether anything may drop: the module or any part of it is in training mode."""
        if module.training:
            return True
        if torch.compiler.is_dynamo_compiling():  # which guards on what it reads: the list below would come as a change
            return any(m.training for m in module.modules())
        if self._modules is None:
            self._modules = list(module.modules())
        return any(m.training for m in self._modules)

    def _makes_masks(self, module: nn.Module) -> bool:
        """Whether masks may be made by hand in it, which only a trace tells from other random values."""
        if self._mentions_masks is None:
            self._mentions_masks = makes_masks(module)
        return self._mentions_masks

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs and all(type(a) is Tensor for a in args):
            leaves, spec = list(args), len(args)
        else:
            leaves, spec = pytree.tree_flatten(opened((args, kwargs)))  # type: ignore[assignment]
        key = None if self.opaque or _not_traceable_now() else key_of(leaves)
        if key is None:
            return self._as_written(module, args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        found = self.find((spec, *key), tensors)
        if found is None:
            if tensor_parallel(module):
                return self._left_alone(module, args, kwargs)
            try:
                found = self.specialise(module, args, kwargs, (spec, *key))
            except TraceRefused as refusal:
                return self._refused(module, args, kwargs, refusal.reason)
            except PassError as error:
                warnings.warn(f"dropfx.compile: {error}; the model runs as written", RuntimeWarning, stacklevel=5)
                return self._refused(module, args, kwargs, str(error))
        if runtime.disabled and found.keep_all is not None:
            with runtime.keeping_all():
                return found.keep_all(module, tensors)
        if runtime.disabled or not found.sites:
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
        with runtime.keeping_none():  # the trace is for later calls too
            made = Specialisation(module, self.prefix, self.options, args, kwargs, original_class)
        for path, reason in made.leaves.items():
            if reason:
                self._adopt(module.get_submodule(path), f"{self.prefix}{path}.")
        made.note_classes(module)
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
                unswap(child)
            raise
        self.opaque = reason
        return out

    def _as_written(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.opaque:
            if tensor_parallel(module, (args, kwargs)):
                return self._left_alone(module, args, kwargs)
            self._adopt_children(module, self.prefix)
        return _original_forward(module, args, kwargs)

    def _left_alone(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """No part of a tensor-parallel model is compiled, whatever the part's own tensors are."""
        self.opaque = TENSOR_PARALLEL
        self.cache.clear()
        for child in module.children():
            unswap(child, adopted=True)
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
        leaf = next(child.children(), None) is None and not _user_code(child)
        lone = type(child) in DROPOUT_MODULES or (leaf and type(child) not in RECURRENT_MODULES)
        if "_dropfx" in child.__dict__ or lone or not may_drop(child) or not _swappable(child):
            return False
        if parametrize.is_parametrized(child):  # its class is parametrize's, which edits it later
            return False
        swap(child, State(self.options, prefix, own=False))
        return True

    def _warn_if_nothing_drops(self, found: Specialisation) -> None:
        if self.own and not self.warned and not found.context.sites and not any(found.leaves.values()):
            self.warned = True
            warnings.warn(NOTHING_DROPS, NoDropoutWarning, stacklevel=6)


NOTHING_DROPS = "dropfx.compile: the model has no dropout that is active in training; it is left as it was"


class Compiled:
    """Mixed into the class of a compiled module."""

    _dropfx_original: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does not call on: registries of the user's classes must not meet the swapped one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        own: Any = getattr(self, "__getstate__", None)  # nn.LSTM's leaves out what cannot be copied
        return _rebuild, (self._dropfx_original,), self.__dict__.copy() if own is None else own()


def original_class(module: nn.Module) -> type:
    """The class that the user wrote."""
    cls = type(module)
    return cls._dropfx_original if issubclass(cls, Compiled) else cls


@functools.cache
def _compiled_class(cls: Any) -> Any:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The rewritten graph where there is a state; the class' own forward otherwise."""
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
    original: Any = module._dropfx_original
    forward = original.forward
    if not runtime.disabled:
        return forward(module, *args, **kwargs)
    with runtime.keeping_all():
        return forward(module, *args, **kwargs)


def swap(module: nn.Module, state: State) -> None:
    """Make `module` a compiled one, in place, by the subclass of its class whose forward asks `state`."""
    module.__dict__["_dropfx"] = state
    module.__class__ = _compiled_class(original_class(module))


def unswap(module: nn.Module, adopted: bool = False) -> None:
    """Give the module its class back, and all parts that were compiled with it; `adopted`: these parts alone."""
    for part in module.modules():
        state = part.__dict__.get("_dropfx")
        if state is not None and ((part is module and not adopted) or not state.own):
            swapped: Any = type(part)
            part.__class__ = _uncompiled_class(swapped)
            del part.__dict__["_dropfx"]


@functools.cache
def _uncompiled_class(cls: Any) -> Any:
    """The class without ours in it; one that was put over ours since, as fully_shard does, stays."""
    if not issubclass(cls, Compiled):
        return cls
    if "_dropfx_original" in cls.__dict__:
        return cls._dropfx_original
    names = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(map(_uncompiled_class, cls.__bases__)), names)


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
