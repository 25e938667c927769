"""Every kernel compiles for GPUs that are not here: matrix instructions, operands in whole vectors, no spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dropfx.kernels import configs

INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
PRODUCTS = 14
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that a program may have."""


def compiled(dtype: str, arch: int, *tiles: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(Path(__file__).with_name("ahead.py")), dtype, str(arch), *tiles]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def check_resources(kernel: dict[str, Any]) -> None:
    assert kernel["LOCAL"] == 0, kernel
    assert kernel["STACK"] == 0, kernel
    assert kernel["shared"] <= SHARED_MEMORY[kernel["arch"]], kernel


def products_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    products = [kernel for kernel in found if "_matmul" in kernel["kernel"] or "weight_gradient" in kernel["kernel"]]
    return [kernel for kernel in products if "_bias" not in kernel["kernel"]]


def check(dtype: str, arch: int, instruction: str | None) -> None:
    found = compiled(dtype, arch)
    products = products_of(found)
    assert len(products) == PRODUCTS
    for kernel in found:
        check_resources(kernel)
    if instruction is not None:
        assert [kernel for kernel in products if instruction not in kernel["matrix"]] == []
    for kernel in products:
        assert kernel["copies"] > 0, f"nothing is copied ahead: {kernel}"
    singles = [kernel["kernel"].partition(" ")[0] for kernel in found if kernel["single"]]
    assert singles == (WITH_SINGLE_ITEMS if dtype != "fp32" else [])


WITH_SINGLE_ITEMS = ["matmul._matmul", "weight_gradient._bias"]
"""The one launch whose window begins anywhere, and the bias' few sums. Of half precision: other items are wider."""


@pytest.mark.parametrize("arch", INSTRUCTION)
def test_half_precision(arch: int) -> None:
    check("bf16", arch, INSTRUCTION[arch])


@pytest.mark.slow
@pytest.mark.parametrize("arch", INSTRUCTION)
def test_other_precisions(arch: int) -> None:
    check("fp16", arch, INSTRUCTION[arch])
    check("fp32", arch, None)  # in full, which matrix instructions do not offer


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("arch", INSTRUCTION)
def test_every_tile_that_tuning_tries(arch: int, dtype: str) -> None:
    found = compiled(dtype, arch, "all")
    tiles = {kernel["tile"] and tuple(kernel["tile"]) for kernel in found}
    size = 4 if dtype == "fp32" else 2
    assert tiles == {None, *map(tuple, configs.tuned(size, arch // 10))}
    for kernel in found:
        check_resources(kernel)
    if dtype != "fp32":
        assert [kernel for kernel in products_of(found) if INSTRUCTION[arch] not in kernel["matrix"]] == []
