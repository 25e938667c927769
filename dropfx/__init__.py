"""dropfx: the PyTorch graph compiler pass that stops paying for dropped activations."""

from dropfx import patterns, testing
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
from dropfx.runtime import disabled
from dropfx.statistics import Statistics, statistics

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
