"""lstm(..., dropout(ones(N, 1), p).expand_as(W) * W, ...) -> lstm(..., dropout1d(W, p), ...)

The variational form of awd-lstm-lm's WeightDrop drops rows of a recurrent weight by a mask that it makes by hand.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.nn import functional as F

from dropfx.graph.dropout_ops import RECURRENT_FUNCTIONS
from dropfx.graph.nodes import argument, insert, op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.op_families import MULTIPLICATIONS
from dropfx.graph.pass_infra import Context, PassResult


def recognise_row_masks(module: fx.GraphModule, context: Context) -> PassResult:
    """Replace the products with such masks that nothing else reads, where they are weights of recurrent functions."""
    modified = False
    for node in list(module.graph.nodes):
        weighs = any(user.target in RECURRENT_FUNCTIONS for user in node.users)
        if weighs and op_name(node) in MULTIPLICATIONS and len(node.args) == 2 and not node.kwargs:
            modified |= any(_recognise(node, *pair) for pair in (node.args, node.args[::-1]))
    return PassResult(module, modified)


def _recognise(product: fx.Node, weight: Any, mask: Any) -> bool:
    chain = _chain(mask)
    if chain is None or not isinstance(weight, fx.Node) or not _is_of_rows(product, weight, chain[-1]):
        return False
    drop = chain[-1]
    with product.graph.inserting_before(product):
        # which takes [N, K] for one sample of N channels
        site = insert(product.graph, F.dropout1d, (weight, argument(drop, 1, "p", 0.5), True), like=product)
    if "site" in notes(drop):
        notes(site)["site"] = notes(drop)["site"]
    product.replace_all_uses_with(site)
    for node in (product, *chain):  # a dropout would stay though nobody reads it
        product.graph.erase_node(node)
    return True


def _chain(mask: Any) -> list[fx.Node] | None:
    """From the mask to its dropout of ones, no part of which has another reader; None where it is another value."""
    nodes = [mask]
    if isinstance(mask, fx.Node) and op_name(mask) in ("expand", "expand_as"):
        nodes.append(mask.args[0])
    drop = nodes[-1]
    if not isinstance(drop, fx.Node) or drop.target is not F.dropout or argument(drop, 2, "training", True) is not True:
        return None
    ones = argument(drop, 0, "input")
    if op_name(ones) not in ("ones", "new_ones"):
        return None
    alone = all(len(node.users) == 1 and "pinned" not in notes(node) for node in (*nodes, ones))
    return nodes if alone else None


def _is_of_rows(product: fx.Node, weight: fx.Node, drop: fx.Node) -> bool:
    """Whether a mask [N, 1] multiplies a weight [N, K] of its dtype."""
    made, whole, drawn = map(value_of, (product, weight, drop))
    if made is None or whole is None or drawn is None or whole.dim() != 2 or drawn.dtype != whole.dtype:
        return False
    return made.shape == whole.shape and tuple(drawn.shape) == (whole.size(0), 1)
