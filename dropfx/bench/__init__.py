"""Benchmarks behind `dropfx bench NAME`."""

from __future__ import annotations

import importlib
from types import ModuleType

BENCHES = {
    "mlp": "dropfx.bench.mlp",
    "compile": "dropfx.bench.compile",
    "lstm": "dropfx.bench.lstm",
    "rows": "dropfx.bench.rows",
    "predictions": "dropfx.bench.predictions",
    "fidelity": "dropfx.bench.fidelity",
    "perplexity": "dropfx.bench.perplexity",
    "paper": "dropfx.bench.paper",
    "gpu": "dropfx.bench.gpu",
}


def load(name: str) -> ModuleType:
    """The bench's module, with `add_arguments(parser)` and `main(args) -> int`; KeyError for an unknown name."""
    return importlib.import_module(BENCHES[name])
