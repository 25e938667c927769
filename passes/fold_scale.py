"""linear(x * s, W) -> s * (x @ W^T) + b        base + alpha * (y * s) -> base + s * y, for alpha = 1

Only into an operation that is linear in the scaled value and reads it directly; the scale never moves past gelu.
"""

from __future__ import annotations

from torch import fx

from dropfx import ops
from dropfx.graph.pass_infra import Context, PassResult

_SCALED = {ops.linear_op: 0, ops.residual_add_op: 1}
"""Op -> position of the operand that a scale may leave; the op's own scale is its reference's last argument."""


def fold_scale(module: fx.GraphModule, context: Context) -> PassResult:
    """Give the sites' scalar scales to the products after them; a vector scale (ragged blocks) stays."""
    scalar = context.scalar_scales()
    modified = False
    for node in module.graph.nodes:
        if node.target is not ops.scale_units or node.args[1] not in scalar:
            continue
        for user in [user for user in node.users if user.target in _SCALED]:
            *operands, own = ops.grouped(user.target, user.args)
            place = _SCALED[user.target]
            if operands[place] is node and own == 1.0 and user.args.count(node) == 1:
                operands[place], own = node.args[:2]
                user.args = ops.flat(user.target, *operands, own)
                modified = True
    return PassResult(module, modified)
