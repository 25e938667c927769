"""dropfx::op -> what executes it, from the front end and the lowering asked for."""

from __future__ import annotations

from typing import Any

from torch import fx

from dropfx.ops import EAGER
from dropfx.pass_infra import Context, PassResult


def lower(module: fx.GraphModule, context: Context) -> PassResult:
    """Triton's ops where they are asked for.

    Of the others eager graphs call the autograd functions, which dispatch faster; compilers keep the registered ops.
    """
    table: dict[Any, Any] = EAGER if context.eager else {}
    kernels: dict[Any, Any] = {}
    if context.options.lowering == "triton":
        from dropfx.ops.by_kernels import KERNELS as kernels  # imports Triton

    modified = False
    for node in module.graph.nodes:
        if node.target in kernels:
            node.target, node.meta["lowering"] = kernels[node.target], "triton"
            modified = True
        elif node.target in table:
            node.target = table[node.target]
            modified = True
    return PassResult(module, modified)
