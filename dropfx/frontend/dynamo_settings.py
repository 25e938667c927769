"""What dropfx sets for the whole process, all of it Dynamo's, and for how long.

Captures hold Dynamo's own lock while theirs are in force, and leave everything as it was; other threads train
meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch._dynamo.config
from torch._dynamo import config
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.utils import graph_break_reasons

CAPTURING: dict[str, Any] = {
    "allow_rnn": True,  # else nn.LSTM is no part of a graph
    "allow_unspec_int_on_nn_module": True,  # a counter of the forward is an input from its first change on
    "skip_nnmodule_hook_guards": False,  # hooks that are added or removed later are heard
    "optimize_ddp": False,  # backward is autograd's own, and overlaps as it does uncompiled
    "capture_dynamic_output_shape_ops": True,  # an index by a mask ends no graph
    "assume_static_by_default": True,
    "automatic_dynamic_shapes": True,
    "specialize_float": False,
    "suppress_errors": False,
    "fail_on_recompile_limit_hit": False,
    "recompile_limit": 2**20,  # ours is counted here
    "accumulated_recompile_limit": 2**20,
}
"""Settings while Dynamo captures for `dropfx.compile`."""

_IGNORED = {warnings.simplefilter, warnings.filterwarnings}
"""What would end a graph, and changes nothing that a graph computes."""

_SAID_BY_EXPLAIN = ("Dynamo does not know how to trace", "The .grad attribute")
"""Warnings of Dynamo's while it captures: why it ends a graph, and of its own look at an input's gradient."""


@contextlib.contextmanager
def capturing() -> Iterator[list[str]]:
    """While it lasts Dynamo captures for dropfx, one thread at a time; filled with why its graphs ended."""
    reasons: list[str] = []
    ignored = config.ignore_logging_functions | _IGNORED | _logged_once()
    # filters of warnings and the list of reasons are the process'
    with compile_lock, config.patch(**CAPTURING, ignore_logging_functions=ignored), warnings.catch_warnings():
        for message in _SAID_BY_EXPLAIN:
            warnings.filterwarnings("ignore", message)
        breaks = len(graph_break_reasons)
        yield reasons
        reasons += [reason.reason for reason in graph_break_reasons[breaks:]]


def _logged_once() -> set[Any]:
    """Methods that a package gave all loggers to log what was not logged yet: a message is no reason to end a graph."""
    return {method for method in vars(logging.Logger).values() if hasattr(method, "cache_info")}


def allow_recurrent() -> None:
    """Let Dynamo take recurrent layers into its graphs, for the whole process; by default it leaves them out silently.

    For `torch.compile(backend="dropfx")`, whose captures follow the user's settings; DROPFX_ALLOW_RNN=0 prevents it.
    """
    if os.environ.get("DROPFX_ALLOW_RNN") != "0":
        torch._dynamo.config.allow_rnn = True
