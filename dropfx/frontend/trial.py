"""A trial run: a copy of the model in training mode, copies of the inputs; random generators do not change."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from dropfx.errors import InvalidModel
from dropfx.frontend.packed_sequence import opened
from dropfx.frontend.swapped_class import unswap


def training_copy(model: nn.Module, share: bool = True) -> nn.Module:
    """An uncompiled copy of the model in training mode; its parameters are the model's own where `share`.

    Raises:
        InvalidModel: the model cannot be copied.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share else {}
    for module in model.modules():
        for leaf in pytree.tree_leaves(list(vars(module).values())):
            if isinstance(leaf, Tensor) and not is_lazy(leaf) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach().clone()  # an activation that the forward keeps: deepcopy refuses it
    try:
        trial = copy.deepcopy(model, memo)
    except Exception as error:
        raise InvalidModel(
            "model: copy.deepcopy fails on it, and a copy is what dropfx tries the inputs on "
            f"(with FSDP2, call this before fully_shard): {error}"
        ) from error
    unswap(trial)
    return trial.train()


def copy_inputs(inputs: Any) -> Any:
    """Copies of all tensors in a structure of inputs, so that a trial cannot write into the user's."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad) if not t.is_sparse else t, opened(inputs)
    )


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the states of PyTorch's, Python's and NumPy's random generators on leaving."""
    state = random_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        restore_random(state)


def seed_others(seed: int) -> None:
    """Seed Python's and NumPy's generators."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


def random_state() -> Any:
    """States of the generators of Python and, where it is imported, NumPy."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def restore_random(state: Any) -> None:
    """Set the generators back to what `random_state` returned."""
    random.setstate(state[0])
    if (numpy := sys.modules.get("numpy")) is not None and state[1] is not None:
        numpy.random.set_state(state[1])
