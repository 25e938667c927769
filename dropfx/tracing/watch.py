"""State that a forward must not change behind the graph's back: modes, random generators, containers."""

from __future__ import annotations

import random
import sys
from collections import deque
from typing import Any

import torch
from torch import nn


def modes() -> tuple[Any, ...]:
    """Grad mode, inference mode, autocast's dtype on each device type (False: off), the hooks of saved tensors."""
    devices = ("cpu", "cuda")
    autocast = tuple(torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in devices)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, hooks


def which_mode(before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    """The reason for a refusal: which of the `modes` differs. They must not all be equal."""
    names = ("grad mode", "inference mode", "autocast", "saved-tensor hooks (activation checkpointing)")
    return "its forward changes " + next(n for n, a, b in zip(names, before, now, strict=True) if a != b)


def random_state() -> Any:
    """States of the generators of Python and, where it is imported, NumPy, to be compared."""
    numpy = sys.modules.get("numpy")
    numbers = None if numpy is None else tuple(numpy.random.get_state()[1].tolist())
    return random.getstate(), numbers


def restore_random(state: Any) -> None:
    """Set the generators back to what `random_state` returned; does nothing where they are there still."""
    if random_state() == state:
        return
    random.setstate(state[0])
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, _, *rest = numpy.random.get_state()
        numpy.random.set_state((kind, numpy.array(state[1], dtype="uint32"), *rest))


def contents(module: nn.Module) -> dict[str, Any]:
    """Contents of the module's own plain containers, by identity of their elements."""
    own = object.__getattribute__(module, "__dict__")
    return {
        name: [id(v) for v in (value.values() if isinstance(value, dict) else value)]
        for name, value in own.items()
        if isinstance(value, (list, set, dict, deque)) and name not in ("_parameters", "_buffers", "_modules")
    }
