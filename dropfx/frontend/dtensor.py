"""Models whose tensors are distributed (DTensor): what FSDP2 gathers before a forward, and what nobody gathers.

Everything is read from PyTorch's modules only where these are loaded: they take long to import.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

TENSOR_PARALLEL = "its parameters or inputs are tensor-parallel (DTensor)"


def is_distributed(value: Any) -> bool:
    """Whether `value` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def tensor_parallel(module: nn.Module, inputs: Any = ()) -> bool:
    """Whether an input or a tensor of the module is a DTensor in its forward: one that fully_shard does not gather.

    The ranks of such a model compute parts of one result. Each rank draws on its own, and the parts would not fit.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False  # without a look at all tensors, which a call that cannot be traced would pay for each time
    if any(map(is_distributed, pytree.tree_leaves(inputs))):
        return True
    found = [t for t in itertools.chain(module.parameters(), module.buffers()) if is_distributed(t)]
    if not found:
        return False
    gathered = {id(tensor) for part in module.modules() for tensor in _gathered(part)}
    return any(id(tensor) not in gathered for tensor in found)


def _state(module: nn.Module) -> Any:
    """What fully_shard (or its sibling, replicate) keeps for a module, None for others."""
    get = getattr(type(module), "_get_fsdp_state", None)
    return None if get is None else get(module)


def _gathered(module: nn.Module) -> Iterator[Tensor | None]:
    """The sharded parameters whose plain whole the module's pre-forward hook puts in their place."""
    for group in getattr(_state(module), "_fsdp_param_groups", ()):
        for parameter in group.fsdp_params:
            if not parameter.is_dtensor:
                yield parameter.sharded_param
                yield getattr(parameter, "_sharded_post_forward_param", None)
