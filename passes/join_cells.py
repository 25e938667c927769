"""cell_of_gates(linear(x, W_ih, b), linear(h, W_hh, b'), c) -> lstm_cell(x, (h, c), W_ih, W_hh, b, b')

The reverse of `expand_cells`, where both products stayed dense: PyTorch's own step is less calls.
"""

from __future__ import annotations

from typing import cast

from torch import fx
from torch.nn import functional as F

from dropfx.graph.nodes import argument, insert
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.ops.recurrent.one_step import CELL_FUNCTIONS, cell_of_gates

_FUNCTIONS = {kind: function for function, kind in CELL_FUNCTIONS.items()}


def join_cells(module: fx.GraphModule, context: Context) -> PassResult:
    """Make whole the steps of which nothing is gathered."""
    modified = False
    for node in list(module.graph.nodes):
        if node.target is cell_of_gates:
            modified |= _join(node)
    return PassResult(module, modified)


def _join(node: fx.Node) -> bool:
    kind, *gates, state = cast(tuple[str, fx.Node, fx.Node, fx.Node], node.args)
    if any(gate.target is not F.linear or len(gate.users) > 1 for gate in gates):
        return False
    (x, w_ih, b_ih), (h, w_hh, b_hh) = (
        (argument(gate, 0, "input"), argument(gate, 1, "weight"), argument(gate, 2, "bias")) for gate in gates
    )
    hx = (h, state) if kind == "lstm" else h
    with node.graph.inserting_before(node):
        whole = insert(node.graph, _FUNCTIONS[kind], (x, hx, w_ih, w_hh, b_ih, b_hh), like=node)
    node.replace_all_uses_with(whole)
    for erased in (node, *gates):
        node.graph.erase_node(erased)
    return True
