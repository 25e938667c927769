"""lstm(x, (h, c), weights, ...) -> recurrence(linear(x, W_ih, b_ih + b_hh), h, c, W_hh) a layer and direction

The dropouts between layers become sites of their own, and the product of the inputs a Linear like any other: it is
gathered as such, for all steps at once. GRU and RNN alike. One that does not train stays whole; further compilers get
it as an op of ours, because PyTorch 2.13 breaks on what it would make of oneDNN's.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import fx
from torch.nn import functional as F

from dropfx import ops
from dropfx.graph.dropout_ops import RECURRENT_FUNCTIONS, recurrent_names
from dropfx.graph.dropout_ops import Call as SiteCall
from dropfx.graph.emit import Emitter
from dropfx.graph.nodes import argument, value_of
from dropfx.graph.notes import Dropping, notes
from dropfx.graph.pass_infra import Context, PassResult


def expand_recurrent(module: fx.GraphModule, context: Context) -> PassResult:
    """Take apart what trains, and wrap the rest where the graph goes on to a further compiler."""
    modified, grad_mode = False, torch.is_grad_enabled()
    for node in list(module.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            grad_mode = node.args[0]
        if node.op != "call_function" or node.target not in RECURRENT_FUNCTIONS:
            continue
        call = _call(node)
        if call is not None and call.batch_sizes is None:
            context.time_axis = int(call.batch_first)
        if call is not None and (call.training or not context.eager):
            results = _expand(node, call, context) if call.training else _wrap(node, call, grad_mode)
            for user in list(node.users):
                user.replace_all_uses_with(results[cast(int, user.args[1])])
                node.graph.erase_node(user)
            node.graph.erase_node(node)
            modified = True
    return PassResult(module, modified)


class Call(NamedTuple):
    """Arguments of torch.lstm, torch.gru, torch.rnn_tanh or torch.rnn_relu.

    Attributes:
        x: [T, B, I], [B, T, I], or packed [N, I] with batch_sizes [T].
        states: h, or h and c, of all layers and directions.
        weights: of each layer and direction in turn: W_ih, W_hh, b_ih, b_hh, W_hr, where they are.
    """

    kind: str
    x: fx.Node
    batch_sizes: fx.Node | None
    states: list[fx.Node]
    weights: list[fx.Node]
    biases: bool
    layers: int
    dropout: float
    training: bool
    directions: int
    batch_first: bool


def _call(node: fx.Node) -> Call | None:
    """The arguments, None where they are not all known here."""
    given = {name: argument(node, place, name) for place, name in enumerate(recurrent_names(node.args))}
    x, hx, params = given.get("input", given.get("data")), given["hx"], given["params"]
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    if any(value_of(operand) is None for operand in (x, *states, *params)):
        return None
    if any(not isinstance(user.args[1] if user.target is operator.getitem else None, int) for user in node.users):
        return None
    each, rest = divmod(len(params), given["num_layers"] * (2 if given["bidirectional"] else 1))
    if rest or each - 2 * bool(given["has_biases"]) not in (2, 3):  # which is an error
        return None
    return Call(
        RECURRENT_FUNCTIONS[node.target],
        cast(fx.Node, x),
        given.get("batch_sizes"),
        cast(list[fx.Node], states),
        list(params),
        given["has_biases"],
        given["num_layers"],
        given["dropout"],
        given["train"],
        2 if given["bidirectional"] else 1,
        bool(given.get("batch_first", False)),
    )


def _wrap(node: fx.Node, call: Call, grad_mode: bool) -> list[fx.Node]:
    """The output and the last states, computed as written."""
    emit = Emitter(node)
    options = (call.biases, call.layers, call.directions == 2, call.batch_first, grad_mode)
    tensors = call.x, call.batch_sizes, call.states, call.weights
    made = emit(ops.recurrent_as_written_op, call.kind, *tensors, *options)
    return [emit(operator.getitem, made, number) for number in range(1 + len(call.states))]


def _expand(node: fx.Node, call: Call, context: Context) -> list[fx.Node]:
    """The output and the last states, computed layer by layer."""
    emit = Emitter(node)
    value, last = call.x, list[list[fx.Node]]()
    each = len(call.weights) // (call.layers * call.directions)
    if "pinned" in notes(call.x):  # the products keep their input for backward, which a later write must not reach
        value = emit("clone", value)
    for layer in range(call.layers):
        if layer and call.dropout:
            value = emit(F.dropout, value, call.dropout, True)
            notes(value)["site"] = _site(node, call, layer - 1)
        outs = []
        for direction in range(call.directions):
            place = layer * call.directions + direction
            weights = call.weights[place * each : (place + 1) * each]
            out, *state = _layer(emit, call, value, place, weights, context)
            outs.append(out)
            last.append(state)
        value = outs[0] if len(outs) == 1 else emit(torch.cat, outs, -1)
        value = emit("transpose", value, 0, 1) if call.batch_first else value
    if "pinned" in notes(node):  # the op keeps an output for backward, which a write into the result must not reach
        value = emit("clone", value)
    return [value, *(emit(torch.stack, list(states)) for states in zip(*last, strict=True))]


def _layer(
    emit: Emitter, call: Call, x: fx.Node, place: int, weights: Sequence[fx.Node], context: Context
) -> list[fx.Node]:
    """Output, steps first, and last states of one direction of a layer."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if call.biases else (None, None)
    w_hr = rest[-1] if len(rest) % 2 else None
    gru = call.kind == "gru"
    bias = b_ih if gru or b_ih is None else emit(torch.add, b_ih, b_hh)
    # the inputs are narrower than the gates, or their kept units are; but groups lie along the batch
    early = call.batch_first and not (context.options.along_rows or context.options.as_needed)
    pre = emit(F.linear, emit("transpose", x, 0, 1) if early else x, w_ih, bias)
    pre = emit("transpose", pre, 0, 1) if call.batch_first and not early else pre
    states: list[fx.Node | None] = [emit("select", state, 0, place) for state in call.states]
    states += [None] * (2 - len(states))
    reverse = place % call.directions == 1
    operands = pre, *states, w_hh, b_hh if gru else None, w_hr, call.batch_sizes, reverse
    made = emit(ops.recurrence_op, *ops.flat(ops.recurrence_op, call.kind, *operands, None, None))
    return [emit(operator.getitem, made, number) for number in range(1 + len(call.states))]


def _site(node: fx.Node, call: Call, gap: int) -> Dropping:
    """Name and live rate of the dropout after a layer."""
    known = notes(node).get("recurrent", Dropping(SiteCall(node.name), call.dropout))
    return known._replace(call=known.call._replace(part=f"dropout[{gap}]"))
