"""Calls for which nothing was rewritten: they run the forward itself, without a look at the captured graphs.

A small model, which no site of gains, would pay for guards in vain. To run the forward as it is is always right; what
could be missed is a gain, where something has changed that is not looked at here. So the graphs are asked again from
time to time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dropfx.graph.dropout_ops import DROPOUT_MODULES, RECURRENT_MODULES

_CALLS = 64
"""After this many calls as they are the graphs are asked."""
_KINDS = 64
"""Kinds of calls that are told apart; with more, all are forgotten."""


class LeftAlone:
    """Kinds of calls of one module.

    Args:
        modules: of the model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._dropouts = [m for m in modules if isinstance(m, DROPOUT_MODULES)]
        self._recurrent = [m for m in modules if isinstance(m, RECURRENT_MODULES)]
        self._calls: dict[Any, int] = {}

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether such a call was left alone before; counts it."""
        kind = self._kind(args, kwargs)
        calls = self._calls.get(kind, _CALLS)
        if calls >= _CALLS:
            self._calls.pop(kind, None)
            return False
        self._calls[kind] = calls + 1
        return True

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing was rewritten for such a call."""
        if len(self._calls) >= _KINDS:
            self._calls.clear()
        self._calls[self._kind(args, kwargs)] = 0

    def _kind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What of a call decides whether a site pays: sizes of inputs, and the dropouts' rates."""
        return (
            tuple([_kind(arg) for arg in args]),
            tuple([(name, _kind(arg)) for name, arg in kwargs.items()]) if kwargs else (),
            tuple([(m.p, m.training) for m in self._dropouts]),
            tuple([(m.dropout, m.training) for m in self._recurrent]),
        )


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.requires_grad
    if isinstance(value, (tuple, list)):
        return tuple([_kind(item) for item in value])
    return value if value is None or isinstance(value, (bool, int, str)) else type(value)
