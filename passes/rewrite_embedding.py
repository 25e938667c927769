"""embedding(ids, W) -> W[ids][:, cols]: only the kept columns of the looked-up rows are read."""

from __future__ import annotations

from torch import fx

from dropfx import ops
from dropfx.graph.nodes import argument, insert, op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.passes.rewrite_sites import kept_of


def rewrite_embedding(module: fx.GraphModule, context: Context) -> PassResult:
    """Replace the Embeddings that the plan made producers."""
    modified = False
    for node in list(module.graph.nodes):
        if op_name(node) != "embedding" or "form" not in notes(node):
            continue
        graph = node.graph
        weight, padding = argument(node, 1, "weight"), argument(node, 2, "padding_idx")
        value = value_of(weight)
        assert value is not None
        padding_idx = -1 if padding is None else padding % value.size(0)
        with graph.inserting_before(node):
            kept = kept_of(graph, notes(node)["form"], context)
            args = ops.flat(ops.embedding_op, argument(node, 0, "input"), weight, kept, padding_idx)
            new = insert(graph, ops.embedding_op, args, like=node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        modified = True
    return PassResult(module, modified)
