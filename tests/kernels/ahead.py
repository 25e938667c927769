"""Compiles every kernel ahead of time, as its launcher would launch it, and prints what came of it as JSON.

`python ahead.py DTYPE,... ARCH,... [all]`: a process of its own, since Triton decides at import whether it interprets.
With `all` each product is compiled with every tile that tuning tries, otherwise with the table's.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dropfx import kernels
from dropfx.kernels import Axis, configs
from dropfx.kernels.configs import Config

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_CONSTANT = 0x1E3779B97F4A7C15
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launches:
    """Takes the place of launching: keeps what was asked for."""

    def __init__(self) -> None:
        self.sources: list[tuple[ASTSource, dict[str, int]]] = []

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for index, parameter in enumerate(kernel.params):
            name, value = parameter.name, values[parameter.name]
            if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        self.sources.append((ASTSource(kernel, signature, constants, attributes), options))


def launch_all(dtype: torch.dtype) -> None:
    """One launch of each kernel and kind of addressing."""
    rows, units, run = 8192, 8192, 64
    x, w = (torch.empty(rows, units, dtype=dtype, device="meta") for _ in range(2))
    bias = torch.empty(units, dtype=dtype, device="meta")
    dense = Axis(None, 0, units)
    blocks = Axis(torch.empty(units // run // 2, dtype=torch.int64, device="meta"), run, units)
    half = x[:, : units // 2].contiguous()
    for activation in ("tanh", "gelu"):  # those that need the most registers
        kernels.gathered_matmul(half, w, dense, blocks, bias=bias, scale=2.0, activation=activation)
    kernels.gathered_matmul(x, w.t(), blocks, dense)
    kernels.gathered_matmul(half, w, blocks, blocks)
    grouped = blocks._replace(starts=torch.empty(64, units // run // 2, dtype=torch.int64, device="meta"))
    kernels.gathered_matmul(half, w, dense, grouped, leading=rows)
    short = Axis(torch.empty(units // 32, dtype=torch.int64, device="meta"), 16, units)
    kernels.gathered_matmul(half, w, dense, short)
    kernels.gathered_matmul(x, w.t(), short, dense)
    window = Axis(torch.empty(1, dtype=torch.int64, device="meta"), units // 2, units)
    kernels.gathered_matmul(half, w, dense, window)
    kernels.weight_gradient(x, half, dense, blocks)
    kernels.weight_gradient(x, half, dense, grouped, leading=rows)
    kernels.weight_gradient(half, half, short, short)
    kernels.bias_gradient(half, blocks)
    for window in (False, True):
        sites = [kernels.DrawnSite(key=5, slots=kernels.MAX_SLOTS, kept=4096, units=64)]
        draw = kernels.DrawLaunch(sites, (_CONSTANT, _CONSTANT, _CONSTANT), torch.device("meta"), window)
        draw(torch.empty((), dtype=torch.int64, device="meta"), _CONSTANT)
    kernels.gather_units(x, -1, blocks)
    kernels.scatter_units(half, -1, blocks, base=x)
    kernels.tiled_matmul(x, w, (32, 32), 2, 1, bias=bias)
    kernels.tiled_matmul(x, w.t(), (32, 32), 2, 1)
    kernels.tiled_weight_gradient(x, x, (32, 32), 2, 1)


def resources(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump -res-usage` says of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", printed)}


def compiled(source: ASTSource, options: dict[str, int], arch: int) -> dict[str, Any]:
    """What a kernel needs, and by which instructions it multiplies and moves."""
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = made.asm["ptx"]
    return {
        "arch": arch,
        "matrix": sorted(set(re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx))),
        # operands that are copied to shared memory 16 bytes at a time, and items that go through registers alone
        "copies": len(re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)),
        "single": len(re.findall(r"\b(?:ld|st)\.global\.b16\b", ptx)),
        "shared": made.metadata.shared,
        **resources(made.asm["cubin"]),
    }


def tiles_of(dtype: torch.dtype, arch: int, every: bool) -> list[Config | None]:
    """None for those of the table; every: and all that tuning tries, for every product."""
    return [None, *(configs.tuned(dtype.itemsize, arch // 10) if every else ())]


@contextmanager
def tile_of_all(tile: Config | None) -> Iterator[None]:
    """Products get this tile, where they are not of those that get the small one only."""
    by_table = configs._by_table
    if tile is not None:
        configs._by_table = lambda m, n, dtype, small: by_table(m, n, dtype, small) if small == "only" else tile
    try:
        yield
    finally:
        configs._by_table = by_table


def compiled_for(dtype: torch.dtype, arch: int, tile: Config | None, launches: Launches) -> Iterator[dict[str, Any]]:
    launches.sources.clear()
    with tile_of_all(tile):
        launch_all(dtype)
    for number, (source, options) in enumerate(launches.sources):
        name = f"{source.fn.__module__.rpartition('.')[2]}.{source.name} {number}"
        yield {"kernel": name, "tile": tile, "dtype": TYPES[dtype], **compiled(source, options, arch)}


def main() -> None:
    launches = Launches()
    JITFunction.run = lambda self, *args, **kwargs: launches.run(self, *args, **kwargs)
    found = []
    for dtype, arch in product([TYPES_BY_NAME[n] for n in sys.argv[1].split(",")], map(int, sys.argv[2].split(","))):
        for tile in tiles_of(dtype, arch, sys.argv[3:] == ["all"]):
            found += compiled_for(dtype, arch, tile, launches)
    json.dump(found, sys.stdout)


TYPES_BY_NAME = {name: dtype for dtype, name in TYPES.items()}

if __name__ == "__main__":
    main()
