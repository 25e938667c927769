"""linear(x * s, W) -> s * (x @ W^T) + b        base + alpha * (y * s) -> base + s * y, for alpha = 1
conv(x * s, W, b) -> conv(x, W * s, b)         where the kept weight is smaller than x

Only into an operation that is linear in the scaled value and reads it directly; the scale never moves past gelu.
"""

from __future__ import annotations

import torch
from torch import fx

from dropfx import ops
from dropfx.graph.nodes import argument, op_name, put_in_place, value_of
from dropfx.graph.op_families import CONVOLUTIONS
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
        for user in [user for user in node.users if op_name(user) in CONVOLUTIONS]:
            modified |= _into_weight(user, node)
    return PassResult(module, modified)


def _into_weight(convolution: fx.Node, scaled: fx.Node) -> bool:
    x, scale, _ = scaled.args
    weight = argument(convolution, 1, "weight")
    values = value_of(scaled), value_of(weight)
    if argument(convolution, 0, "input") is not scaled or weight is scaled or values[0] is None or values[1] is None:
        return False
    if values[1].numel() >= values[0].numel():
        return False
    with convolution.graph.inserting_before(convolution):
        by_scale = convolution.graph.call_function(torch.mul, (weight, scale))
    by_scale.meta = {"val": values[1]}
    put_in_place(convolution, scaled, x)
    put_in_place(convolution, weight, by_scale)
    return True
