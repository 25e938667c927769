"""Whether Triton's kernels run on a device, found out once a process by launching one."""

from __future__ import annotations

import importlib.util

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily


def why_no_kernels(device: torch.device) -> str:
    """Why what may choose does not take Triton's kernels on `device`; "" where they run.

    They need an installed Triton, a GPU that it knows, and the C compiler by which it makes its launchers. What names
    them (`lowering="triton"`) gets their own error instead.
    """
    if device.type != "cuda":
        return "Triton's kernels need a GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device not in _found:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured"  # where no kernel can be loaded: not the answer of later calls
        _found[device] = _why_none_launches(device)
    return _found[device]


_found: dict[torch.device, str] = {}


def _why_none_launches(device: torch.device) -> str:
    try:
        from dropfx.kernels import Axis, gather_units

        with unset_fake_temporarily():  # a compiler may be asking
            starts = torch.zeros(1, dtype=torch.int64, device=device)
            gather_units(torch.zeros(1, 2, device=device), -1, Axis(starts, 1, 2))
    except Exception as error:  # whatever a compiler, a driver or a launcher raises
        return f"Triton fails here: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return ""
