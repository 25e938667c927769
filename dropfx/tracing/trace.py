"""What tracing makes: the recorded graph, and on what of the modules it rests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree


class Unknown:
    """The value of what cannot be known before it runs."""


UNKNOWN = Unknown()


@dataclasses.dataclass(frozen=True)
class Guard:
    """A plain attribute that the trace read: the trace holds while check(value) == expected."""

    path: str
    name: str
    expected: Any
    check: Callable[[Any], Any] | None = None


@dataclasses.dataclass
class Trace:
    """A recorded forward.

    Attributes:
        graph: one placeholder a tensor leaf of the inputs; returns the tuple of the output's leaves.
        out_spec: pytree structure of the output.
        guards: what was read of the modules.
        visited: path -> (class, has hooks or an own forward) of every module met.
        leaves: path -> reason of the modules that stay calls.
        exact_shapes: the trace used sizes as numbers.
    """

    graph: fx.Graph
    out_spec: pytree.TreeSpec
    guards: list[Guard]
    visited: dict[str, tuple[type, bool]]
    leaves: dict[str, str]
    exact_shapes: bool
