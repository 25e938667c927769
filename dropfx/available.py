"""Whether Triton's kernels run on a device, found out once a process by launching one."""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def why_no_kernels(device: torch.device) -> str:
    """Why what may choose does not take Triton's kernels on `device`; "" where they run.

    They need an installed Triton, a GPU that it knows, and the C compiler by which it makes its launchers. What names
    them (`lowering="triton"`) gets their own error instead.
    """
    if device.type != "cuda":
        return "Triton's kernels need a GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from dropfx.kernels import Axis, take_units

        starts = torch.zeros(1, dtype=torch.int64, device=device)
        take_units(torch.zeros(1, 2, device=device), -1, Axis(starts, 1, 2))
    except Exception as error:  # whatever a compiler, a driver or a launcher raises
        return f"Triton fails here: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return ""
