"""Whether kernels run in Triton's interpreter, on the CPU: decided when Triton decorates them, at import."""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
