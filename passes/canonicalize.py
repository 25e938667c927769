"""dropout(x, training=False) -> x        size(relu(x), 0) -> size(x, 0)

One form for later passes: no dropout that is off, and sizes are asked of the first value that has them, so that asking
does not force a value to be dense.
"""

from __future__ import annotations

import torch
from torch import fx

from dropfx.axis_rules import AXIS_RULES
from dropfx.graphs import argument, op_name, value_of, writes_in_place
from dropfx.pass_infra import Context, PassResult
from dropfx.sites import DROPOUT_FUNCTIONS


def canonicalize(module: fx.GraphModule, context: Context) -> PassResult:
    """Bring the graph to the form that later passes match."""
    modified = False
    for node in list(module.graph.nodes):
        modified |= _drop_inactive(node) or _ask_size_at_source(node)
    return PassResult(module, modified)


def _drop_inactive(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in DROPOUT_FUNCTIONS:
        return False
    training = argument(node, 2, "train" if node.target is torch.dropout else "training", True)
    if training is not False or writes_in_place(node):
        return False
    node.replace_all_uses_with(argument(node, 0, "input"))
    node.graph.erase_node(node)
    return True


# -- sizes ----------------------------------------------------------------------------------------------------------


def _ask_size_at_source(node: fx.Node) -> bool:
    if op_name(node) != "size" or len(node.args) != 2 or not isinstance(node.args[1], int):
        return False
    source, dim = node.args
    value = value_of(source)
    if value is None or not isinstance(source, fx.Node) or not isinstance(dim, int):
        return False
    origin, at = _origin(source, dim % value.dim())
    if origin is source:
        return False
    node.args = (origin, at)
    return True


def _origin(source: fx.Node, dim: int) -> tuple[fx.Node, int]:
    while True:
        value, name = value_of(source), op_name(source)
        assert value is not None
        if name == "linear":
            if dim == value.dim() - 1:
                weight = argument(source, 1, "weight")
                return (weight, 0) if isinstance(weight, fx.Node) else (source, dim)
            source = argument(source, 0, "input")
            continue
        pointwise = name in AXIS_RULES or (source.op == "call_function" and source.target in DROPOUT_FUNCTIONS)
        same = [o for o in source.all_input_nodes if (v := value_of(o)) is not None and v.shape == value.shape]
        if not pointwise or not same or name in ("transpose", "permute", "t"):
            return source, dim
        source = same[0]
