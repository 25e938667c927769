"""dropfx: the PyTorch graph compiler pass that stops paying for dropped activations."""

import dropfx.pickles  # noqa: F401  # where models saved by earlier versions look for their parts
from dropfx import patterns, testing
from dropfx.draws.runtime import disabled
from dropfx.errors import (
    DropfxError,
    InvalidInput,
    InvalidModel,
    InvalidOption,
    LoweringUnavailable,
    NoDropoutWarning,
    NotEquivalent,
)
from dropfx.explain import Report, explain
from dropfx.frontend.compile import compile, restore
from dropfx.frontend.fx_graph import Tracer, rewrite
from dropfx.pattern_statistics.report import Statistics, statistics

__version__ = "0.1.0"

__all__ = [
    "DropfxError",
    "InvalidInput",
    "InvalidModel",
    "InvalidOption",
    "LoweringUnavailable",
    "NoDropoutWarning",
    "NotEquivalent",
    "Report",
    "Statistics",
    "Tracer",
    "compile",
    "disabled",
    "explain",
    "patterns",
    "restore",
    "rewrite",
    "statistics",
    "testing",
]
