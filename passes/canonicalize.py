"""dropout(x, training=False) -> x        addmm(b, x, W) -> linear(x, W^T, b)        size(relu(x), 0) -> size(x, 0)

One form for later passes: no dropout that is off, one spelling of a layer's product, and sizes are asked of the first
value that has them, so that asking does not force a value to be dense.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from dropfx.graph.dropout_ops import DROPOUT_FUNCTIONS
from dropfx.graph.nodes import argument, clean_up, op_name, substitute, switched_off, value_of, writes_in_place
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.graph.size_origin import origin


def canonicalize(module: fx.GraphModule, context: Context) -> PassResult:
    """Bring the graph to the form that later passes match."""
    modified = clean_up(module.graph)  # a part of a split that nobody reads is no reader
    # tiles are dropped in the weights of Linears alone, as `record` hands them out
    by_units = not context.options.pattern.drops_weights
    for node in list(module.graph.nodes):
        modified |= _drop_inactive(node) or _name_transpose(node) or _ask_size_at_source(node)
        modified |= by_units and _spell_as_linear(node)
    return PassResult(module, modified)


def _drop_inactive(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in DROPOUT_FUNCTIONS:
        return False
    if not switched_off(node) or writes_in_place(node):
        return False
    node.replace_all_uses_with(argument(node, 0, "input"))
    node.graph.erase_node(node)
    return True


# -- products -------------------------------------------------------------------------------------------------------


def _name_transpose(node: fx.Node) -> bool:
    """The attributes x.T of a matrix and x.mT, as the method that they stand for."""
    if node.op != "call_function" or node.target is not getattr or node.args[1] not in ("T", "mT"):
        return False
    value = value_of(node.args[0])
    if value is None or value.dim() < 2 or (value.dim() > 2 and node.args[1] == "T"):
        return False
    node.op, node.target, node.args = "call_method", "transpose", (node.args[0], -2, -1)
    return True


def _spell_as_linear(node: fx.Node) -> bool:
    """A product with a matrix [in, out] from outside of the graph: HF's Conv1D, layers written by hand."""
    product = _product(node)
    if product is None:
        return False
    x, matrix, bias = product
    weight, value = _transposed(matrix), value_of(matrix)
    if weight is None:
        if matrix.op not in _GIVEN or value is None:
            return False
        with node.graph.inserting_before(node):
            weight = node.graph.call_method("t", (matrix,))
        notes(weight)["val"] = value.t()
    node.op, node.target, node.args, node.kwargs = "call_function", F.linear, (x, weight, bias), {}
    return True


_GIVEN = ("get_attr", "placeholder")


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """(x, matrix, bias) of a product that linear(x, matrix^T, bias) computes too."""
    name, count = op_name(node), len(node.args)
    if node.kwargs or (name, count) not in (("addmm", 3), ("matmul", 2), ("mm", 2)):
        return None
    *bias, x, matrix = node.args
    values = [value_of(operand) for operand in (x, matrix, *bias)]
    dense = all(v is not None and v.layout is torch.strided and v.is_floating_point() for v in values)
    if not dense or [v.dim() for v in values[1:] if v is not None] != [2, 1][: len(values) - 1]:
        return None
    if bias and values[2].size(0) != values[1].size(1):  # type: ignore[union-attr]
        return None
    return x, matrix, bias[0] if bias else None  # type: ignore[return-value]


def _transposed(matrix: fx.Node) -> fx.Node | None:
    """The weight whose transpose a matrix is."""
    source = matrix.args[0] if matrix.op not in _GIVEN and op_name(matrix) in ("t", "transpose") else None
    return source if isinstance(source, fx.Node) and source.op in _GIVEN and _swaps(matrix) else None


def _swaps(node: fx.Node) -> bool:
    return op_name(node) == "t" or (len(node.args) == 3 and {a % 2 for a in node.args[1:]} == {0, 1})  # type: ignore[operator]


# -- sizes ----------------------------------------------------------------------------------------------------------


def _ask_size_at_source(node: fx.Node) -> bool:
    if op_name(node) != "size" or len(node.args) != 2:
        return False
    source, dim = node.args
    value = value_of(source)
    if value is None or not isinstance(source, fx.Node) or not isinstance(dim, int):
        return False
    found = origin(source, dim % value.dim())
    if isinstance(found, int):
        substitute(node.graph, node, found)
    elif found[0] is source:
        return False
    else:
        node.args = found
    return True
