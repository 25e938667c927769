"""torch.lstm and its kin on a kept W_ih, which backward gathers again where autograd would keep the copy for it.

Such a copy would lie beside all that is computed until its backward. Gathering it twice takes a fraction of a percent
of the products over all steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dropfx.ops.kept import Kept
from dropfx.ops.runs import gather


def recompute_gather(
    kind: str, kept: Tensor, weight: Tensor, starts: Tensor, run: int, dim: int, *args: Any
) -> tuple[Tensor, ...]:
    """torch.<kind>(*args), which reads kept = gather(weight, starts, run, dim).

    Raises:
        RuntimeError: in backward, where `weight` was changed in place in between, as of any saved tensor.
    """
    function: Any = getattr(torch, kind)
    if not _may_hook():
        return tuple(function(*args))
    place, version = _place(kept), weight._version

    def pack(saved: Tensor) -> Tensor | None:
        """None in place of `kept`."""
        return None if _place(saved) == place else saved

    def unpack(packed: Tensor | None) -> Tensor:
        """What was saved."""
        if packed is not None:
            return packed
        if weight._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a"
                f" weight of shape {list(weight.shape)} is at version {weight._version}; expected version {version}"
            )
        with torch.no_grad():
            return gather(weight, dim, Kept(starts, run))

    with saved_tensors_hooks(pack, unpack):
        return tuple(function(*args))


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride()


def _may_hook() -> bool:
    """Whether anything is saved and nobody else, a checkpoint or an offloader, decides how."""
    core: Any = torch._C._autograd
    taken = not core._saved_tensors_hooks_is_enabled() or core._top_saved_tensors_default_hooks(True) is not None
    return torch.is_grad_enabled() and not taken
