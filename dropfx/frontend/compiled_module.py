"""The state of a compiled module, which answers the calls of the swapped class' forward.

It runs the graphs that Dynamo captured of the original forward, rewritten, or the original forward where nothing
drops. A module whose parts are called on their own, or whose forward Dynamo cannot follow, hands its options on to its
parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

from dropfx.draws.runtime import runtime, shared
from dropfx.errors import NoDropoutWarning
from dropfx.frontend.left_alone import LeftAlone
from dropfx.frontend.packed_sequence import takes_packed
from dropfx.frontend.swapped_class import _rebuild as _rebuild  # by this name in pickles of earlier versions
from dropfx.frontend.swapped_class import original_class, original_forward, swap, swappable
from dropfx.frontend.watch import Watch
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
        self._watch: Watch | None = None
        self._left_alone: LeftAlone | None = None
        self._modules: list[nn.Module] | None = None
        self._mentions_masks: bool | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return State(self.options, self.prefix, self.own)

    def __reduce__(self) -> Any:
        return State, (self.options, self.prefix, self.own)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward of a compiled module."""
        if not self._drops(module):
            return original_forward(module, args, kwargs)
        if torch.compiler.is_dynamo_compiling():  # its graphs are captured on their own, with options of their own
            if not self.own and not takes_packed(module, args):
                return original_forward(module, args, kwargs)  # a part of what is being captured
            from dropfx.frontend.uncaptured import uncaptured

            return uncaptured(self._run, module, args, kwargs)
        return self._run(module, args, kwargs)

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._watch is not None:
            self._watch.end()
            self._watch = None
        if _as_written_now() or (shared.disabled and not self._makes_masks(module)):
            return original_forward(module, args, kwargs)
        looked_at = shared.records or shared.disabled
        if self._left_alone is not None and not looked_at and self._left_alone.takes(args, kwargs):
            return original_forward(module, args, kwargs)
        if self.capture is None:
            from dropfx.frontend.capture import Capture  # imports Dynamo, which is slow

            self.capture = Capture(module, self.options, self.prefix, self._hand_on)
        with runtime.outermost():
            result = self.capture(module, args, kwargs)
        if self.capture.left or any(graph.rewritten for graph in self.capture.graphs):
            self._left_alone = None
        else:
            self._left_alone = self._left_alone or LeftAlone(module.modules())
            self._left_alone.add(args, kwargs)
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
        if "_dropfx" in part.__dict__ or lone or not may_drop(part) or not swappable(part):
            return False
        swap(part, State(self.options, prefix, own=False))
        return True

    def watch(self, module: nn.Module) -> None:
        """Compile the parts where a backward comes before any call of the forward."""
        self._watch = Watch(module, self)

    def serve(self, module: nn.Module) -> None:
        """Let what was captured of a copy serve `module`."""
        self._modules = self._left_alone = None
        if self.capture is not None:
            self.capture.serve(module)


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children, those in lists and dicts among them, by their paths."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


NOTHING_DROPS = "dropfx.compile: the model has no dropout that is active in training; it runs as written"


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
