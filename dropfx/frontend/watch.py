"""A compiled module whose forward nobody calls: the first backward shows it, and its parts are compiled instead."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from dropfx.frontend.swapped_class import original_class


class Watch:
    """Waits for a gradient of a module's parameters, until the first call of its forward ends that.

    Args:
        module: the compiled one.
        state: its state.
    """

    def __init__(self, module: nn.Module, state: Any) -> None:
        self._module = module
        self._state: Any = state
        self._hook: Any = None
        able = (p for p in module.parameters() if p.requires_grad and p.is_leaf and not is_lazy(p))
        parameter = next(able, None)
        if parameter is not None:
            self._hook = parameter.register_post_accumulate_grad_hook(self._look)

    def end(self) -> None:
        """The forward is called."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _look(self, _: Any) -> None:
        self.end()
        module = self._module
        compiled = module.__dict__.get("_dropfx") is self._state
        if compiled and module.training:
            warnings.warn(_never_called(module, self._state.adopt_parts(module)), RuntimeWarning, stacklevel=2)


def _never_called(module: nn.Module, adopted: list[str]) -> str:
    name = original_class(module).__name__
    text = f"dropfx.compile compiles the forward of {name}, but a gradient arrived and this forward was not called"
    if adopted:
        return f"{text}; from now on its parts {', '.join(adopted)} are compiled on their own"
    return f"{text}; compile the module that is called, as in dropfx.compile(model.net)"
