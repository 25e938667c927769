"""linear(x * s, W) -> s * (x @ W^T) + b        base + alpha * (y * s) -> base + s * y, for alpha = 1

Only into an operation that is linear in the scaled value and reads it directly; the scale never moves past gelu.
"""

from __future__ import annotations

from torch import fx

from dropfx import ops
from dropfx.graph.pass_infra import Context, PassResult

_SCALED = {ops.linear_op: (0, 7), ops.residual_add_op: (1, 6)}
"""Op -> positions of the operand that a scale may leave and of the op's own scale."""


def fold_scale(module: fx.GraphModule, context: Context) -> PassResult:
    """Give the sites' scalar scales to the products behind them; a vector scale (ragged blocks) stays."""
    scalar = context.scalar_scales()
    modified = False
    for node in module.graph.nodes:
        if node.target is not ops.scale_units or node.args[1] not in scalar:
            continue
        for user in list(node.users):
            operand, own = _SCALED.get(user.target, (None, None))
            if operand is None or own is None or user.args[operand] is not node or user.args[own] != 1.0:
                continue
            if user.args.count(node) == 1:
                user.update_arg(operand, node.args[0])
                user.update_arg(own, node.args[1])
                modified = True
    return PassResult(module, modified)
