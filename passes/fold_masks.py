"""x' * (1 * s) -> x' * s        a dropout of ones is its scale wherever it keeps

What a mask made by hand leaves in each product that reads it; `fold_scale` has it from there.
"""

from __future__ import annotations

from torch import fx

from dropfx import ops
from dropfx.graph.nodes import insert, op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.op_families import MULTIPLICATIONS
from dropfx.graph.pass_infra import Context, PassResult


def fold_masks(module: fx.GraphModule, context: Context) -> PassResult:
    """Scale by a number what is multiplied by kept ones times that number; a vector scale (ragged blocks) stays."""
    scalar = context.scalar_scales()
    modified = False
    for mask in list(module.graph.nodes):
        if mask.target is not ops.scale_units or mask.args[1] not in scalar or not _kept_ones(mask.args[0]):
            continue
        for product in list(mask.users):
            modified |= _fold(product, mask)
    return PassResult(module, modified)


def _kept_ones(node: object) -> bool:
    if not isinstance(node, fx.Node) or node.target is not ops.gather_op:
        return False
    ones = node.args[0]
    if not isinstance(ones, fx.Node) or "pinned" in notes(ones) or notes(ones).get("asks_gradient"):
        return False
    return op_name(ones) in ("ones", "ones_like", "new_ones")


def _fold(product: fx.Node, mask: fx.Node) -> bool:
    if op_name(product) not in MULTIPLICATIONS or len(product.args) != 2 or product.kwargs:
        return False
    x = product.args[1] if product.args[0] is mask else product.args[0]
    value, made, form = value_of(x), value_of(product), notes(mask).get("form")
    # compact alike, and neither broadcast nor promoted by the mask
    if not isinstance(x, fx.Node) or x is mask or value is None or made is None or notes(x).get("form") != form:
        return False
    if value.shape != made.shape or value.dtype != made.dtype:
        return False
    with product.graph.inserting_before(product):
        scaled = insert(product.graph, ops.scale_units, (x, mask.args[1], mask.args[2]), like=product)
    product.replace_all_uses_with(scaled)
    product.graph.erase_node(product)
    return True
