"""Where parts of models that were pickled by earlier versions are now."""

from __future__ import annotations

import importlib
import sys

MOVED = {
    "dropfx.compiled": "dropfx.frontend.compiled_module",
    "dropfx.pass_infra": "dropfx.options",
}
"""Module that such a pickle names -> the one that has its classes."""

for _name, _now in MOVED.items():
    sys.modules.setdefault(_name, importlib.import_module(_now))
