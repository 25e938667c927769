"""A compiled module: the swapped class, and the state that answers its calls.

The forward of the swapped class runs the graphs that Dynamo captured of the original forward, rewritten, or the
original forward where nothing drops. A module whose parts are called on their own, or whose forward Dynamo cannot
follow, hands its options on to its parts.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from dropfx.draws.runtime import runtime, shared
from dropfx.errors import NoDropoutWarning
from dropfx.frontend.packed_sequence import takes_packed
from dropfx.graph.dropout_ops import DROPOUT_MODULES, RECURRENT_MODULES, makes_masks, may_drop
from dropfx.options import Options

if TYPE_CHECKING:
    from dropfx.frontend.capture import Capture


class State:
    """What a compiled module carries: its options and what was captured of its forward.

    Attributes:
        own: compiled by the user, not as a part of a model.
        prefix: path of the module in the compiled model, "" or ending in a dot.
    """

    def __init__(self, options: Options, prefix: str = "", own: bool = True, quiet: bool = False) -> None:
        self.options, self.prefix, self.own = options, prefix, own
        self._told = quiet or not own
        self.capture: Capture | None = None
        self._watch: Any = None
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
        if torch.compiler.is_dynamo_compiling():  # its graphs are captured on their own, with options of their own
            if not self.own and not takes_packed(module, args):
                return _original_forward(module, args, kwargs)  # a part of what is being captured
            from dropfx.frontend.uncaptured import uncaptured

            return uncaptured(self._run, module, args, kwargs)
        return self._run(module, args, kwargs)

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._unwatch()
        if _as_written_now() or (shared.disabled and not self._makes_masks(module)):
            return _original_forward(module, args, kwargs)
        if self.capture is None:
            from dropfx.frontend.capture import Capture  # imports Dynamo, which is slow

            self.capture = Capture(module, self.options, self.prefix, self._hand_on)
        with runtime.outermost():
            result = self.capture(module, args, kwargs)
        if not self._told:
            self._told = True
            graphs = self.capture.graphs
            if graphs and not self.capture.left and not any(graph.drops for graph in graphs):
                warnings.warn(NOTHING_DROPS, NoDropoutWarning, stacklevel=5)
        return result

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
        """Whether masks may be made by hand in it, which only a graph tells from other random values."""
        if self._mentions_masks is None:
            self._mentions_masks = makes_masks(module)
        return self._mentions_masks

    # -- parts that are compiled on their own ------------------------------------------------------------------------

    def _hand_on(self, module: nn.Module, path: str) -> None:
        """The forward of a part runs as written, or some of it: its parts may be called outside of graphs."""
        for name, child in _parts(module):
            self.adopt(child, f"{path}.{name}." if path else f"{name}.")

    def adopt_parts(self, module: nn.Module) -> list[str]:
        """Compile the parts of a module whose own forward is not called; their names."""
        return [name for name, child in _parts(module) if self.adopt(child, f"{self.prefix}{name}.")]

    def adopt(self, part: nn.Module, prefix: str) -> bool:
        """Compile a part of the model on its own, where something could be rewritten inside."""
        leaf = next(part.children(), None) is None and not _user_code(part)
        lone = type(part) in DROPOUT_MODULES or (leaf and not isinstance(part, RECURRENT_MODULES))
        if "_dropfx" in part.__dict__ or lone or not may_drop(part) or not _swappable(part):
            return False
        swap(part, State(self.options, prefix, own=False))
        return True

    def serve(self, module: nn.Module) -> None:
        """Let what was captured of a copy serve `module`."""
        self._modules = None
        if self.capture is not None:
            self.capture.serve(module)

    def watch(self, module: nn.Module) -> None:
        """Where the first backward comes without a call of the forward, compile the parts, which are called then."""
        able = (p for p in module.parameters() if p.requires_grad and p.is_leaf and not is_lazy(p))
        parameter = next(able, None)
        if parameter is None:
            return

        def look(_: Any) -> None:
            """A gradient has arrived."""
            if self._unwatch() and module.__dict__.get("_dropfx") is self and module.training:
                warnings.warn(_never_called(module, self.adopt_parts(module)), RuntimeWarning, stacklevel=2)

        self._watch = parameter.register_post_accumulate_grad_hook(look)

    def _unwatch(self) -> bool:
        """Whether it was watched until now, which is until the first call."""
        if self._watch is None:
            return False
        self._watch.remove()
        self._watch = None
        return True


def _never_called(module: nn.Module, adopted: list[str]) -> str:
    name = original_class(module).__name__
    text = f"dropfx.compile compiles the forward of {name}, but a gradient arrived and this forward was not called"
    if adopted:
        return f"{text}; from now on its parts {', '.join(adopted)} are compiled on their own"
    return f"{text}; compile the module that is called, as in dropfx.compile(model.net)"


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children, those in lists and dicts among them, by their paths."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


NOTHING_DROPS = "dropfx.compile: the model has no dropout that is active in training; it runs as written"


class Compiled:
    """Mixed into the class of a compiled module."""

    _dropfx_original: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does not call on: registries of the user's classes must not meet the swapped one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        own: Any = getattr(self, "__getstate__", None)  # nn.LSTM's leaves out what cannot be copied
        state = self.__dict__.copy() if own is None else own()
        if isinstance(state, dict) and isinstance(state.get("_dropfx"), State):
            state = {**state, "_dropfx": state["_dropfx"].__deepcopy__({})}  # a shallow copy has graphs of its own
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


def _original_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    original: Any = module._dropfx_original
    forward = original.forward
    if not shared.disabled:
        return forward(module, *args, **kwargs)
    with runtime.keeping_all():
        return forward(module, *args, **kwargs)


def swap(module: nn.Module, state: State) -> None:
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


def _as_written_now() -> bool:
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
    # the class of a parametrized module is parametrize's, which edits it later
    own = isinstance(module, torch.jit.ScriptModule) or parametrize.is_parametrized(module)
    return not own and "forward" not in module.__dict__
