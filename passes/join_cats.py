"""linear(h, W[:, :n]) + linear(c, W[:, n:], b) -> linear(cat([h, c], -1), W, b)

The reverse of `expand_cats`, where no product reads its part compact: one product is less calls.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from dropfx.graph.nodes import insert
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.passes.expand_cats import Whole


def join_cats(module: fx.GraphModule, context: Context) -> PassResult:
    """Make whole the products of which no part is gathered by its columns."""
    modified = False
    for node in list(module.graph.nodes):
        if "whole" in notes(node):
            modified |= _join(node, *notes(node)["whole"])
    return PassResult(module, modified)


def _join(total: fx.Node, whole: Whole, products: list[fx.Node], sums: list[fx.Node]) -> bool:
    forms = {notes(node).get("form") for node in (*products, *sums)}
    if len(forms) > 1 or any("reads" in notes(product) for product in products):
        return False
    if any(len(node.users) > 1 for node in (*sums[:-1], *products)):
        return False
    graph = total.graph
    with graph.inserting_before(products[0]):
        # nobody else may have read what the parts were joined to
        x = whole.joined if whole.joined.users else insert(graph, torch.cat, (whole.parts, -1), like=whole.joined)
    with graph.inserting_before(total):
        made = insert(graph, F.linear, (x, whole.weight, whole.bias), like=total)
    for key in ("whole", "reads"):
        made.meta.pop(key, None)
    total.replace_all_uses_with(made)
    for reader in made.users:
        if total in notes(reader).get("reads", {}):
            notes(reader)["reads"][made] = notes(reader)["reads"].pop(total)
    for node in (*sums[::-1], *products):
        graph.erase_node(node)
    return True
