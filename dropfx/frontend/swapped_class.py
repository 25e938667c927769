"""The swapped class: a subclass of the user's, whose forward asks a state; taken away without a trace."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from dropfx.draws.runtime import runtime, shared


class Compiled:
    """Mixed into the class of a compiled module."""

    _dropfx_original: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does not call on: registries of the user's classes must not meet the swapped one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        own: Any = getattr(self, "__getstate__", None)  # nn.LSTM's leaves out what cannot be copied
        state = self.__dict__.copy() if own is None else own()
        if isinstance(state, dict) and state.get("_dropfx") is not None:
            state = {**state, "_dropfx": copy.deepcopy(state["_dropfx"])}  # a shallow copy has graphs of its own
        return _rebuild, (self._dropfx_original,), state


def original_class(module: nn.Module) -> type:
    """The class that the user wrote."""
    cls = type(module)
    return cls._dropfx_original if issubclass(cls, Compiled) else cls


@functools.cache
def _compiled_class(cls: Any) -> Any:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The rewritten graphs where there is a state; the class' own forward otherwise."""
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


def original_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the user wrote, where nothing is rewritten."""
    original: Any = module._dropfx_original
    forward = original.forward
    if not shared.disabled:
        return forward(module, *args, **kwargs)
    with runtime.keeping_all():
        return forward(module, *args, **kwargs)


def swap(module: nn.Module, state: Any) -> None:
    """Make `module` a compiled one, in place, by the subclass of its class whose forward asks `state`."""
    module.__dict__["_dropfx"] = state
    module.__class__ = _compiled_class(original_class(module))


def unswap(module: nn.Module) -> None:
    """Give the module its class back, and all parts that were compiled with it."""
    for part in module.modules():
        state = part.__dict__.get("_dropfx")
        if state is not None and (part is module or not state.own):
            _unswap(part)


def _unswap(module: nn.Module) -> None:
    swapped: Any = type(module)
    module.__class__ = _uncompiled_class(swapped)
    del module.__dict__["_dropfx"]


@functools.cache
def _uncompiled_class(cls: Any) -> Any:
    """The class without ours in it; one that was put over ours since, as fully_shard does, stays."""
    if not issubclass(cls, Compiled):
        return cls
    if "_dropfx_original" in cls.__dict__:
        return cls._dropfx_original
    names = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(map(_uncompiled_class, cls.__bases__)), names)


def swappable(module: nn.Module) -> bool:
    """Whether the class is the user's and its forward is the class'."""
    # the class of a parametrized module is parametrize's, which edits it later
    own = isinstance(module, torch.jit.ScriptModule) or parametrize.is_parametrized(module)
    return not own and "forward" not in module.__dict__
