"""dropfx::op -> what executes it, from the front end and the lowering asked for."""

from __future__ import annotations

from torch import fx

from dropfx.ops import EAGER
from dropfx.pass_infra import Context, PassResult


def lower(module: fx.GraphModule, context: Context) -> PassResult:
    """Eager graphs call the ops' autograd functions, which dispatch faster; compilers keep the registered ops."""
    if not context.eager:
        return PassResult(module, False)
    modified = False
    for node in module.graph.nodes:
        if node.target in EAGER:
            node.target = EAGER[node.target]
            modified = True
    return PassResult(module, modified)
