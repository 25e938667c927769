"""lstm_cell(dropout(x), (h, c), W, U, b, b') -> cell_of_gates(linear(dropout(x), W, b), linear(h, U, b'), c)

A step of LSTM, GRU or RNN that a model makes by itself, in a loop of its own. Its two products become Linears like any
other where something that they read is dropped; `join_cells` makes it whole again where no product gained.
"""

from __future__ import annotations

from torch import fx
from torch.nn import functional as F

from dropfx.graph.emit import Emitter
from dropfx.graph.nodes import argument, value_of
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.ops.recurrent.one_step import CELL_FUNCTIONS, cell_of_gates
from dropfx.planning.regions import is_dropped


def expand_cells(module: fx.GraphModule, context: Context) -> PassResult:
    """Take apart the steps that read dropped values."""
    modified = False
    # tiles are dropped in the weights of Linears alone, as `record` hands them out
    for node in [] if context.options.pattern.drops_weights else list(module.graph.nodes):
        if node.op == "call_function" and node.target in CELL_FUNCTIONS:
            modified |= _expand(node)
    return PassResult(module, modified)


def _expand(node: fx.Node) -> bool:
    x, hx = argument(node, 0, "input"), argument(node, 1, "hx")
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    w_ih, w_hh, b_ih, b_hh = (argument(node, place, name) for place, name in enumerate(names, 2))
    if any(value_of(operand) is None for operand in (x, *states, w_ih, w_hh)):
        return False
    if not (is_dropped(x) or is_dropped(states[0])):
        return False
    emit = Emitter(node)
    gates = emit(F.linear, x, w_ih, b_ih), emit(F.linear, states[0], w_hh, b_hh)
    made = emit(cell_of_gates, CELL_FUNCTIONS[node.target], *gates, states[-1])
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return True
