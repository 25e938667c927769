"""recurrence(linear(x', W_ih[:, cols]), h, c, W_hh) -> lstm(x', (h, c), (W_ih[:, cols], W_hh, ...))

Where PyTorch has a fused recurrence, cuDNN's or oneDNN's, it is faster than steps of ours, on compact inputs
too. It takes a whole layer, the product of the inputs included. Compilers get it as an op of ours, since PyTorch 2.13
breaks on what AOTAutograd would make of it.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch.nn import functional as F

from dropfx import ops
from dropfx.graph.nodes import argument, insert, op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.planning.fused_rnn import in_one_piece


def join_recurrent(module: fx.GraphModule, context: Context) -> PassResult:
    """Join the layers whose kind PyTorch has fused on the device."""
    modified = False
    for node in list(module.graph.nodes):
        if node.target is not ops.recurrence_op or _keeps_weight(node) or not in_one_piece(node, context):
            continue
        inputs = _inputs(node)
        if inputs is not None:
            _join(node, inputs, context)
            modified = True
    return PassResult(module, modified)


def _keeps_weight(node: fx.Node) -> bool:
    """Whether W_hh is compact, which no fused recurrence takes."""
    *_, rows, cols = ops.grouped(ops.recurrence_op, node.args)
    return rows is not None or cols is not None


class _Inputs(NamedTuple):
    """What the product of the inputs reads.

    Attributes:
        cols: the kept columns of its weight.
        turned: it has the batch first, and the recurrence reads its transpose.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    cols: ops.Kept | None
    turned: bool


def _inputs(node: fx.Node) -> _Inputs | None:
    """None where others read the product too, or it is not one product for all rows."""
    linear = cast(fx.Node, node.args[1])
    turned = op_name(linear) == "transpose" and set(linear.args[1:]) == {0, 1} and len(linear.users) == 1
    linear = cast(fx.Node, linear.args[0]) if turned else linear
    if len(linear.users) > 1:
        return None
    if linear.target is ops.linear_op:
        x, weight, bias, rows, cols, scale = ops.grouped(ops.linear_op, linear.args)
        if rows is not None or scale != 1.0 or (cols is not None and cols.leading):
            return None
    elif linear.target is F.linear:
        x, weight, bias = linear.args[0], linear.args[1], argument(linear, 2, "bias")
        cols = None
    else:
        return None
    return _Inputs(x, weight, bias, cols, turned)


def _join(node: fx.Node, inputs: _Inputs, context: Context) -> None:
    graph, reverse = node.graph, node.args[8]
    device = cast(torch.Tensor, value_of(node.args[1])).device
    with graph.inserting_before(node):
        if inputs.turned:
            inputs = inputs._replace(x=_turned(inputs.x))
        biases = _biases(graph, inputs.bias, node.args[5])
        if device.type == "cpu" and not context.eager:
            results = _one_dnn(node, inputs, biases)
        else:
            weight = inputs.weight
            if inputs.cols is not None:
                weight = graph.call_function(ops.gather_op, ops.flat(ops.gather_op, weight, inputs.cols, 1))
            x = graph.call_method("flip", (inputs.x, 0)) if reverse else inputs.x
            results = _function(node, x, weight, biases, context)
            results[0] = graph.call_method("flip", (results[0], 0)) if reverse else results[0]
    for user in list(node.users):
        user.replace_all_uses_with(results[cast(int, user.args[1])])
        graph.erase_node(user)
    graph.erase_node(node)


def _turned(x: fx.Node) -> fx.Node:
    """x [B, T, *] with the steps first."""
    turned, value = insert(x.graph, torch.transpose, (x, 0, 1), like=x), value_of(x)
    if value is not None:
        notes(turned)["val"] = value.transpose(0, 1)
    return turned


def _one_dnn(node: fx.Node, inputs: _Inputs, biases: list[fx.Node]) -> list[fx.Node]:
    """Output and last states by an op of ours around oneDNN's, for compilers."""
    _, pre, h0, c0, w_hh, _, _, _, reverse, *_ = node.args
    graph, x = node.graph, inputs.x
    if not biases:
        gates = cast(torch.Tensor, value_of(pre)).size(-1)
        biases = [graph.call_method("new_zeros", (w_hh, (gates,)))] * 2
    operands = x, inputs.weight, w_hh, *biases, h0, c0
    args = ops.flat(ops.lstm_layer_op, *operands, reverse, _kept_size(x, w_hh), inputs.cols)
    made = graph.call_function(ops.lstm_layer_op, args)
    return [graph.call_function(operator.getitem, (made, number)) for number in range(3)]


def _kept_size(x: fx.Node, w_hh: Any) -> int | None:
    """None where sizes vary. Of inputs that were made compact it is at most that of the whole ones."""
    rows, weight = value_of(x), value_of(w_hh)
    sizes = [] if rows is None or weight is None else [*rows.shape, weight.size(1)]
    return ops.kept_size(*sizes) if sizes and all(type(size) is int for size in sizes) else None


def _function(node: fx.Node, x: fx.Node, weight: fx.Node, biases: list[fx.Node], context: Context) -> list[fx.Node]:
    """Output and last states by PyTorch's function, as an opaque op for compilers."""
    kind, pre, h0, c0, w_hh, _, w_hr, batch_sizes, *_ = node.args
    graph = node.graph
    weights: Any = [w for w in (weight, w_hh, *biases, w_hr) if w is not None]
    in_buffer = cast(torch.Tensor, value_of(pre)).device.type == "cuda"
    if in_buffer:
        weights = graph.call_function(ops.in_one_buffer, (weights,))
    states = [graph.call_method("unsqueeze", (s, 0)) for s in (h0, c0) if s is not None]
    if context.eager:
        hx = tuple(states) if len(states) > 1 else states[0]
        lead, rest = ((x,), (False,)) if batch_sizes is None else ((x, batch_sizes), ())
        options = (bool(biases), 1, 0.0, True, False, *rest)
        args = *lead, hx, weights, *options
        if weight.target is ops.gather_op and not in_buffer:
            made = graph.call_function(ops.recompute_gather, (kind, weight, *weight.args[:4], *args))
        else:
            made = graph.call_function(getattr(torch, str(kind)), args)
    else:
        options = (bool(biases), 1, False, False, True)
        made = graph.call_function(ops.recurrent_as_written_op, (kind, x, batch_sizes, states, weights, *options))
    out, *last = [graph.call_function(operator.getitem, (made, number)) for number in range(1 + len(states))]
    return [out, *(graph.call_method("squeeze", (state, 0)) for state in last)]


def _biases(graph: fx.Graph, bias: fx.Node | None, b_hh: Any) -> list[fx.Node]:
    """The two biases of a layer; those that were added to one, apart again."""
    if bias is None:
        return []
    if b_hh is not None:
        return [bias, b_hh]
    return list(cast(Any, bias.args))
