"""recurrence(linear(x', W_ih[:, cols]), h, c, W_hh) -> lstm(x', (h, c), (W_ih[:, cols], W_hh, ...))

Where PyTorch has a recurrence in one piece, cuDNN's or oneDNN's, it is faster than steps of ours, on compact inputs
too. It takes a whole layer, the product of the inputs included.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch.nn import functional as F

from dropfx import ops
from dropfx.graphs import argument, value_of
from dropfx.pass_infra import Context, PassResult


def join_recurrent(module: fx.GraphModule, context: Context) -> PassResult:
    """Join layers whose kind the device has in one piece; further compilers break on these (PyTorch 2.13)."""
    modified = False
    for node in list(module.graph.nodes):
        if node.target is not ops.recurrence_op or not context.eager or not _in_one_piece(node):
            continue
        inputs = _inputs(node)
        if inputs is not None:
            _join(node, inputs)
            modified = True
    return PassResult(module, modified)


def _in_one_piece(node: fx.Node) -> bool:
    kind, pre, *_, w_hr, batch_sizes, reverse = node.args
    value = value_of(pre)
    if value is None or (reverse and batch_sizes is not None):  # no function visits packed rows backwards alone
        return False
    if value.device.type == "cuda":
        return bool(torch.backends.cudnn.is_available())
    one_dnn = value.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return one_dnn and kind == "lstm" and w_hr is None and value.dtype is torch.float32


class _Inputs(NamedTuple):
    """What the product of the inputs reads; `cols`: starts and run of the kept columns of its weight."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    cols: tuple[Any, Any] | None


def _inputs(node: fx.Node) -> _Inputs | None:
    """None where others read the product too, or it is not one product for all rows."""
    linear = cast(fx.Node, node.args[1])
    if len(linear.users) > 1:
        return None
    if linear.target is ops.linear_op:
        x, weight, bias, rows, _, starts, run, scale, *leading = linear.args
        if rows is not None or scale != 1.0 or any(leading):
            return None
        cols: tuple[Any, Any] | None = None if starts is None else (starts, run)
    elif linear.target is F.linear:
        x, weight, bias = linear.args[0], linear.args[1], argument(linear, 2, "bias")
        cols = None
    else:
        return None
    return _Inputs(cast(fx.Node, x), cast(fx.Node, weight), cast("fx.Node | None", bias), cols)


def _join(node: fx.Node, inputs: _Inputs) -> None:
    kind, _, h0, c0, w_hh, b_hh, w_hr, batch_sizes, reverse = node.args
    graph = node.graph
    with graph.inserting_before(node):
        x, weight = inputs.x, inputs.weight
        if inputs.cols is not None:
            weight = graph.call_function(ops.take_op, (weight, *inputs.cols, 1, 0))
        if reverse:
            x = graph.call_method("flip", (x, 0))
        biases = _biases(graph, inputs.bias, b_hh)
        weights = [w for w in (weight, w_hh, *biases, w_hr) if w is not None]
        states = tuple(graph.call_method("unsqueeze", (s, 0)) for s in (h0, c0) if s is not None)
        hx = states if len(states) > 1 else states[0]
        lead, rest = ((x,), (False,)) if batch_sizes is None else ((x, batch_sizes), ())
        given: Any = weights
        if cast(torch.Tensor, value_of(node.args[1])).device.type == "cuda":
            given = graph.call_function(ops.in_one_buffer, (weights,))
        args = (*lead, hx, given, bool(biases), 1, 0.0, True, False, *rest)
        made = graph.call_function(getattr(torch, str(kind)), args)
        parts = [graph.call_function(operator.getitem, (made, number)) for number in range(1 + len(states))]
        out = graph.call_method("flip", (parts[0], 0)) if reverse else parts[0]
        results = [out, *(graph.call_method("squeeze", (part, 0)) for part in parts[1:])]
    for user in list(node.users):
        user.replace_all_uses_with(results[cast(int, user.args[1])])
        graph.erase_node(user)
    graph.erase_node(node)


def _biases(graph: fx.Graph, bias: fx.Node | None, b_hh: Any) -> list[fx.Node]:
    """The two biases of a layer; those that were added to one, apart again."""
    if bias is None:
        return []
    if b_hh is not None:
        return [bias, b_hh]
    return list(cast(Any, bias.args))
