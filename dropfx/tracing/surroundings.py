"""What is put in PyTorch's place while a forward is recorded, so that no call escapes the graph."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dropfx.tracing.proxies import Proxy
from dropfx.tracing.recurrent import RECURRENT_MODULES
from dropfx.tracing.refusal import TraceRefused

if TYPE_CHECKING:
    from dropfx.tracing.tracer import Tracer


@contextmanager
def surroundings(tracer: Tracer) -> Iterator[None]:
    """All of the below, in force."""
    with ExitStack() as stack:
        for context in (_outside_of_checkpoints(), _Functions(tracer), _no_custom_functions(), _variables()):
            stack.enter_context(context)
        stack.enter_context(_factories(tracer))
        stack.enter_context(_recurrent_forwards(tracer))
        stack.enter_context(_quiet())
        yield


class _Functions(TorchFunctionMode):
    """Records torch functions that no proxy would see, such as torch.randn(3): nothing becomes a constant."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer = self._tracer
        if not tracer.tracing:
            return func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, Proxy) for leaf in leaves):
            return tracer.function(func, args, kwargs)
        with tracer.paused(), tracer.fake_mode:
            out = func(*args, **kwargs)
        return tracer.function(func, args, kwargs) if isinstance(out, Tensor) else out


def _outside_of_checkpoints() -> Any:
    """Hide saved-tensor hooks from the trace: activation checkpointing counts what is saved."""
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


@contextmanager
def _factories(tracer: Tracer) -> Iterator[None]:
    """Let torch.zeros(n, 3) and its kin record a proxied size, which their C argument parser does not take."""
    names = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros")
    originals = {name: getattr(torch, name) for name in names}

    def recording(original: Any) -> Any:
        """The factory, with a recording of calls that are given a proxy."""

        def factory(*args: Any, **kwargs: Any) -> Any:
            """The original's result, or its record."""
            if tracer.tracing and any(isinstance(leaf, Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
                return tracer.record("call_function", original, args, kwargs)
            return original(*args, **kwargs)

        return factory

    for name, original in originals.items():
        setattr(torch, name, recording(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


@contextmanager
def _no_custom_functions() -> Iterator[None]:
    """Refuse autograd.Function.apply on proxies: inlining it would lose its backward, and C would read a proxy."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """The original's result. Raises TraceRefused where a proxy is among the arguments."""
        if any(isinstance(leaf, Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            raise TraceRefused(f"its forward calls an autograd.Function ({cls.__name__})")
        return original.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


@contextmanager
def _variables() -> Iterator[None]:
    """Let torch.autograd.Variable(x), of old code, record that it shares x's memory and not its history."""
    meta: Any = type(torch.autograd.Variable)
    original = meta.__call__

    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """The original's result; a proxy without its history for a Variable of one."""
        data = args[0] if args else kwargs.get("data")
        if cls is not torch.autograd.Variable or not isinstance(data, Proxy):
            return original(cls, *args, **kwargs)
        if any(args[1:]) or any(v for name, v in kwargs.items() if name != "data"):
            raise TraceRefused("its forward makes a Variable that asks for gradients")
        return data.detach()

    meta.__call__ = call
    try:
        yield
    finally:
        del meta.__call__  # it was inherited from type


@contextmanager
def _recurrent_forwards(tracer: Tracer) -> Iterator[None]:
    """Record a forward of nn.LSTM and its kin as one function, whoever calls it: a subclass too, or WeightDrop."""
    originals = {cls: cls.forward for cls in RECURRENT_MODULES}

    def recording(original: Any) -> Any:
        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if tracer.tracing and self.__dict__.get("_dropfx_tracer") is tracer:
                return tracer.recurrent_forward(self, args, kwargs)
            return original(self, *args, **kwargs)

        return forward

    for cls, original in originals.items():
        cls.forward = recording(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls, original in originals.items():
            cls.forward = original  # type: ignore[method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """What goes wrong on fake tensors is a reason for `explain`, not a message to the user."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
