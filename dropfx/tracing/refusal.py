"""Why a forward is not recorded."""

from __future__ import annotations

import torch.utils.checkpoint


class TraceRefused(Exception):
    """A module's forward cannot be recorded; `path` is the innermost such module."""

    def __init__(self, reason: str, path: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.path = reason, path


def why(error: Exception) -> str:
    """The reason that an error while tracing gives."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return "its forward uses activation checkpointing"
        frame = frame.tb_next
    message = str(error).strip().splitlines() or [type(error).__name__]
    return f"its forward cannot be traced: {message[0]}"
