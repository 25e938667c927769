"""lstm(x, (h, c), weights, ...) -> recurrence(linear(x, W_ih, b_ih + b_hh), h, c, W_hh) a layer and direction

The dropouts between layers become sites of their own, and the product of the inputs a Linear like any other: it is
gathered as such, for all steps at once. GRU and RNN alike. One that does not train stays whole; further compilers get
it as an op of ours, because PyTorch 2.13 breaks on what it would make of oneDNN's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from dropfx import ops
from dropfx.graphs import argument, value_of
from dropfx.pass_infra import Context, PassResult
from dropfx.sites import RECURRENT_FUNCTIONS


def expand_recurrent(module: fx.GraphModule, context: Context) -> PassResult:
    """Take apart what trains, and wrap the rest where the graph goes on to a further compiler."""
    modified, grad_mode = False, torch.is_grad_enabled()
    for node in list(module.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            grad_mode = node.args[0]
        if node.op != "call_function" or node.target not in RECURRENT_FUNCTIONS:
            continue
        call = _call(node)
        if call is not None and (call.training or not context.eager):
            results = _expand(node, call) if call.training else _wrap(node, call, grad_mode)
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
    names = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
    packed = len(node.args) > 3 and isinstance(node.args[3], (list, tuple))
    names = ("data", "batch_sizes", *names[1:-1]) if packed else names
    given = {name: argument(node, place, name) for place, name in enumerate(names)}
    x, hx, params = given.get("input", given.get("data")), given["hx"], given["params"]
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    if any(value_of(operand) is None for operand in (x, *states, *params)):
        return None
    if any(not isinstance(user.args[1] if user.target is operator.getitem else None, int) for user in node.users):
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


def _expand(node: fx.Node, call: Call) -> list[fx.Node]:
    """The output and the last states, computed layer by layer."""
    emit = Emitter(node)
    value, last = call.x, list[list[fx.Node]]()
    each = len(call.weights) // (call.layers * call.directions)
    for layer in range(call.layers):
        outs = []
        for direction in range(call.directions):
            place = layer * call.directions + direction
            weights = call.weights[place * each : (place + 1) * each]
            out, *state = _layer(emit, call, value, place, weights)
            outs.append(out)
            last.append(state)
        value = outs[0] if len(outs) == 1 else emit(torch.cat, outs, -1)
        if layer < call.layers - 1 and call.dropout:
            value = emit(F.dropout, value, call.dropout, True)
            value.meta["site"] = _site(node, call, layer)
    return [value, *(emit(torch.stack, list(states)) for states in zip(*last, strict=True))]


def _layer(emit: Emitter, call: Call, x: fx.Node, place: int, weights: Sequence[fx.Node]) -> list[fx.Node]:
    """Output and last states of one direction of a layer."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if call.biases else (None, None)
    w_hr = rest[-1] if len(rest) % 2 else None
    gru = call.kind == "gru"
    bias = b_ih if gru or b_ih is None else emit(torch.add, b_ih, b_hh)
    pre = emit(F.linear, x, w_ih, bias)
    pre = emit("transpose", pre, 0, 1) if call.batch_first else pre
    states: list[fx.Node | None] = [emit("select", state, 0, place) for state in call.states]
    states += [None] * (2 - len(states))
    reverse = place % call.directions == 1
    made = emit(
        ops.recurrence_op, call.kind, pre, *states, w_hh, b_hh if gru else None, w_hr, call.batch_sizes, reverse
    )
    out, *last = (emit(operator.getitem, made, number) for number in range(1 + len(call.states)))
    return [emit("transpose", out, 0, 1) if call.batch_first else out, *last]


def _site(node: fx.Node, call: Call, gap: int) -> dict[str, Any]:
    """Name and live rate of the dropout behind a layer."""
    known = node.meta.get("recurrent", {"path": node.name, "calls": 1, "live": None})
    name = f"{known['path']}.dropout[{gap}]" if known["path"] else f"dropout[{gap}]"
    name = name if known["calls"] == 1 else f"{name}#{known['calls']}"
    return {"name": name, "rate": call.dropout, "live": known["live"]}


def _saving_unseen() -> torch.autograd.graph.saved_tensors_hooks:
    """Activation checkpointing counts what is saved in a forward; what is computed here is none of it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


class Emitter:
    """Adds nodes before one that they replace, with their fake values."""

    def __init__(self, node: fx.Node) -> None:
        self._node = node
        self._kept = {key: value for key, value in node.meta.items() if key in ("path", "after_effects")}
        # the values' own: a compiler that is at work has one too
        self._mode = next(v.fake_mode for n in node.all_input_nodes if isinstance(v := value_of(n), FakeTensor))

    def __call__(self, target: str | Callable[..., Any], *args: Any) -> fx.Node:
        """A node of a function, or of the method of that name."""
        graph = self._node.graph
        with graph.inserting_before(self._node):
            made = graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args)
        values: Any = fx.node.map_arg(args, lambda n: n.meta["val"])
        with self._mode, torch.enable_grad(), _saving_unseen():
            value = getattr(values[0], target)(*values[1:]) if isinstance(target, str) else target(*values)
        made.meta = {**self._kept, "val": value}
        return made
