"""Calls that Dynamo leaves to Python. Imports torch._dynamo, which is slow: only for where that is already loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._dynamo import disable


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


uncaptured = disable(
    _call,
    reason="a model of dropfx.compile has graphs of its own, which cannot be part of another graph; for one whole "
    "graph use torch.compile(plain model, backend='dropfx')",
)
"""uncaptured(f, *args) = f(*args), with a break of the graph around it."""
