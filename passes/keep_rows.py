"""x * mask [B, 1, 1] -> x        rows are kept where dropfx is disabled"""

from __future__ import annotations

import operator

from torch import fx

from dropfx.graph.nodes import insert
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.planning.row_masks import row_masks


def keep_rows(module: fx.GraphModule, context: Context) -> PassResult:
    """Take the masks of rows away, and leave the numbers beside them."""
    modified = False
    for mask in row_masks(module.graph):
        modified = True
        with module.graph.inserting_before(mask.product):
            whole = insert(module.graph, operator.mul, (mask.x, mask.whole), like=mask.product)
        mask.product.replace_all_uses_with(whole)
        for node in reversed([*mask.chain, *mask.body]):  # what draws would stay though nobody reads it
            if not node.users:
                module.graph.erase_node(node)
    return PassResult(module, modified)
