"""Tracing: a module's forward to an fx graph of functional torch calls."""

from dropfx.tracing.tracer import UNKNOWN, Guard, Trace, TraceRefused, hooked, random_state, restore_random, trace

__all__ = ["UNKNOWN", "Guard", "Trace", "TraceRefused", "hooked", "random_state", "restore_random", "trace"]
