"""Adding nodes to a graph before its values are made compact, each with its fake value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from dropfx.graph.notes import notes


class Emitter:
    """Adds nodes before `node`."""

    def __init__(self, node: fx.Node) -> None:
        self._node = node
        self._kept = {key: value for key, value in node.meta.items() if key == "after_effects"}

    def __call__(self, target: str | Callable[..., Any], *args: Any) -> fx.Node:
        """A node of a function, or of the method of that name."""
        graph = self._node.graph
        with graph.inserting_before(self._node):
            made = graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args)
        made.meta = {**self._kept, "val": fake_value(target, *fx.node.map_arg(args, lambda n: notes(n)["val"]))}
        return made


def fake_value(target: str | Callable[..., Any], *values: Any) -> Any:
    """What a function, or the method of that name, makes of fake values."""
    leaves = [leaf for value in values for leaf in (value if isinstance(value, (list, tuple)) else [value])]
    # the values' own mode: a compiler that is at work has one too
    mode = next(leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
    with mode, torch.enable_grad(), _saving_unseen():
        return getattr(values[0], target)(*values[1:]) if isinstance(target, str) else target(*values)


def _saving_unseen() -> torch.autograd.graph.saved_tensors_hooks:
    """Activation checkpointing counts what is saved in a forward; what is computed here is none of it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
