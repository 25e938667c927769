"""Where a launch goes: Triton launches on the current GPU, PyTorch's own operations on that of their operands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


def on_its_device(
    launcher: Callable[Concatenate[Tensor, _Given], _Made],
) -> Callable[Concatenate[Tensor, _Given], _Made]:
    """Let `launcher` launch on the device of its first argument."""

    @functools.wraps(launcher)
    def launch(first: Tensor, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        """The launcher's result, with the first argument's device as the current one."""
        with torch.cuda.device_of(first):
            return launcher(first, *args, **kwargs)

    return launch
