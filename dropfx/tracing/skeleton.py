"""A stand-in of a module tree: the same objects and attributes over fake tensors.

Tracing runs the user's forward. It runs on a skeleton, so that nothing which that forward does to `self` reaches the
user's model, and every attribute that it reads or writes is seen.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dropfx.sharding import cast, is_distributed, precision

if TYPE_CHECKING:
    from dropfx.tracing.tracer import Tracer

_SILENT = frozenset(vars(nn.Module())) - {"training"}
"""Attributes of nn.Module's own machinery: reading them says nothing about the traced program."""


class Recorder:
    """Mixed into the class of every skeleton module; tells the tracer of calls, reads and writes."""

    _dropfx_tracer: Tracer
    _dropfx_class: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does not call on: registries of the user's classes must not meet this copy."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call, as the tracer records it; while it is paused, what the forward returns, without hooks."""
        tracer = self._dropfx_tracer
        if tracer.tracing:
            return tracer.call(self, args, kwargs)
        return run(self, args, kwargs)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in _SILENT or name.startswith("__"):
            return value
        own = object.__getattribute__(self, "__dict__")
        tracer = own.get("_dropfx_tracer")
        return tracer.read(self, name, value) if tracer is not None and tracer.tracing and name in own else value

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        tracer = self.__dict__.get("_dropfx_tracer")
        return tracer.read(self, name, value) if tracer is not None and tracer.tracing else value

    def __setattr__(self, name: str, value: Any) -> None:
        if self._dropfx_tracer.tracing:
            self._dropfx_tracer.write(self, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._dropfx_tracer.tracing:
            self._dropfx_tracer.refuse(f"its forward deletes attribute {name!r}")
        super().__delattr__(name)


def run(module: Any, args: Any, kwargs: Any) -> Any:
    """The forward of a skeleton module, unrecorded, in the precisions that fully_shard's hooks would give it."""
    policy = module.__dict__.get("_dropfx_precision")
    if policy is None:
        return module.forward(*args, **kwargs)
    if policy.cast_forward_inputs:
        args, kwargs = cast((args, kwargs), policy.param_dtype)
    return cast(module.forward(*args, **kwargs), policy.output_dtype)


class Opaque(nn.Module):
    """Stands for a module whose Python forward cannot be seen (ScriptModule)."""


class Builder:
    """Copies a module tree once; shared modules, parameters and tied weights stay shared.

    Args:
        tracer: whom the copies report to.
        original_class: maps a module to the class that its user wrote.
    """

    def __init__(self, tracer: Tracer, original_class: Any) -> None:
        self._tracer = tracer
        self._original_class = original_class
        self._memo: dict[int, Any] = {}
        self._classes: dict[type, type] = {}
        self._precision: Any = None
        self.tensors: dict[int, Tensor] = {}

    def module(self, module: nn.Module) -> nn.Module:
        """The skeleton of a module and its children, with the same attributes; a shared one has one."""
        if id(module) in self._memo:
            return self._memo[id(module)]  # type: ignore[no-any-return]
        cls = Opaque if isinstance(module, torch.jit.ScriptModule) else self._original_class(module)
        made: Any = object.__new__(self._recorder(cls))
        self._memo[id(module)] = made
        attributes = Opaque().__dict__ if cls is Opaque else module.__dict__
        own, around = precision(module), self._precision
        self._precision = own or around
        made.__dict__.update({k: self._value(v) for k, v in attributes.items() if not k.startswith("_dropfx")})
        self._precision = around
        made.__dict__.update(_dropfx_tracer=self._tracer, _dropfx_class=cls, _dropfx_precision=own)
        return made  # type: ignore[no-any-return]

    def tensor(self, tensor: Tensor) -> Tensor:
        """The fake that stands for a parameter or buffer, one for each; a lazy parameter itself."""
        if is_lazy(tensor):
            return tensor  # without a shape there is nothing to fake
        if id(tensor) not in self.tensors and is_distributed(tensor):
            self.tensors[id(tensor)] = self._gathered(tensor)
        if id(tensor) not in self.tensors:
            # a non-leaf's history is not part of the trace, and asking it for .grad warns
            leaf = tensor if tensor.is_leaf else tensor.detach().requires_grad_(tensor.requires_grad)
            self.tensors[id(tensor)] = self._tracer.fake_mode.from_tensor(leaf)
        return self.tensors[id(tensor)]

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The plain whole of a sharded parameter, which FSDP2's hook puts in its place for the time of a forward."""
        dtype = getattr(self._precision, "param_dtype", None) or tensor.dtype
        with self._tracer.fake_mode:
            return torch.empty(tensor.shape, dtype=dtype, device=tensor.device, requires_grad=tensor.requires_grad)

    def _recorder(self, cls: type) -> type:
        if cls not in self._classes:
            self._classes[cls] = type(cls)(
                cls.__name__, (Recorder, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
            )
        return self._classes[cls]

    def _value(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, Tensor):
            return self.tensor(value)
        if type(value) in (list, tuple, set):
            return type(value)(self._value(v) for v in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((k, self._value(v)) for k, v in value.items())
        if isinstance(value, (list, dict, set, deque)):
            return copy.copy(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        return value
