"""Tracing: a module's forward to an fx graph of functional torch calls."""

from dropfx.tracing.refusal import TraceRefused
from dropfx.tracing.trace import UNKNOWN, Guard, Trace
from dropfx.tracing.tracer import hooked, trace
from dropfx.tracing.watch import random_state, restore_random

__all__ = ["UNKNOWN", "Guard", "Trace", "TraceRefused", "hooked", "random_state", "restore_random", "trace"]
