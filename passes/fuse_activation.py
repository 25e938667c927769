"""relu(linear_triton(x, W, ...)) -> activated_linear_triton(x, W, ..., "relu")        relu and tanh.

The product applies the function to its accumulator before it stores it: one value less is written and read. Only where
backward needs no more than the result (`triton_ops.FROM_OUTPUT`) and nobody else reads the product.
"""

from __future__ import annotations

from torch import fx

from dropfx import ops
from dropfx.graph.nodes import insert, op_name
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult


def fuse_activation(module: fx.GraphModule, context: Context) -> PassResult:
    """Fuse the activations after products that `lower` gave to Triton."""
    lowered = [node for node in module.graph.nodes if notes(node).get("lowering") == "triton"]
    if not lowered:
        return PassResult(module, False)
    from dropfx.ops.triton_ops import FROM_OUTPUT, KERNELS, activated_linear_op  # imports Triton

    modified = False
    for node in lowered:
        reader = next(iter(node.users), None)
        if node.target is not KERNELS[ops.linear_op] or reader is None or not _fits(node, reader):
            continue
        name = op_name(reader)
        if name not in FROM_OUTPUT:
            continue
        args = ops.flat(activated_linear_op, *ops.grouped(node.target, node.args), name)
        with module.graph.inserting_before(reader):
            new = insert(module.graph, activated_linear_op, args, like=reader)
        reader.replace_all_uses_with(new)
        module.graph.erase_node(reader)
        module.graph.erase_node(node)
        modified = True
    return PassResult(module, modified)


def _fits(node: fx.Node, reader: fx.Node) -> bool:
    """One reader, of one operand, that runs under the same grad mode and autocast; values written in place stay."""
    alone = len(node.users) == 1 and reader.args == (node,) and not any(reader.kwargs.values())
    same = notes(node).get("after_effects") == notes(reader).get("after_effects")
    return alone and same and "pinned" not in notes(node) and "pinned" not in notes(reader)
