"""Every kernel compiles for GPUs that are not here: matrix instructions, no spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
PRODUCTS = 10


def compiled(dtype: str, arch: int) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(Path(__file__).with_name("ahead.py")), dtype, str(arch)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def check(dtype: str, arch: int, instruction: str | None) -> None:
    found = compiled(dtype, arch)
    products = [kernel for kernel in found if "_matmul" in kernel["kernel"] or "weight_gradient" in kernel["kernel"]]
    products = [kernel for kernel in products if "_bias" not in kernel["kernel"]]
    assert len(products) == PRODUCTS
    for kernel in found:
        assert kernel["LOCAL"] == 0, kernel
        assert kernel["STACK"] == 0, kernel
    if instruction is not None:
        assert [kernel for kernel in products if instruction not in kernel["matrix"]] == []


@pytest.mark.parametrize("arch", INSTRUCTION)
def test_half_precision(arch: int) -> None:
    check("bf16", arch, INSTRUCTION[arch])


@pytest.mark.slow
@pytest.mark.parametrize("arch", INSTRUCTION)
def test_other_precisions(arch: int) -> None:
    check("fp16", arch, INSTRUCTION[arch])
    check("fp32", arch, None)  # in full, which matrix instructions do not offer
