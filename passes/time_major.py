"""dropout(x) -> transpose(dropout(transpose(x)))        for x [B, T, units], where every step has a draw of its own

Groups lie along the leading axis; the transposes move away from the site as far as they commute: into the index of an
embedding, after a Linear, and against each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from dropfx.graph.dropout_ops import DROPOUT_FUNCTIONS
from dropfx.graph.emit import Emitter, fake_value
from dropfx.graph.nodes import argument, op_name, switched_off, value_of
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.ops.shared_dropout import shared_dropout


def time_major(module: fx.GraphModule, context: Context) -> PassResult:
    """Bring steps to the front of the sites of batch-first recurrent networks, under groups="time"."""
    modified = False
    if context.options.groups != "time" or context.time_axis != 1:
        return PassResult(module, modified)
    if any(op_name(node) == "as_strided" for node in module.graph.nodes):  # which reads how a value lies
        return PassResult(module, modified)
    for node in list(module.graph.nodes):
        value = value_of(node)
        # a mask made by hand names the axes along which it is one
        last = DROPOUT_FUNCTIONS.get(node.target) == -1 and node.target is not shared_dropout
        if last and "pinned" not in notes(node) and value is not None and value.dim() == 3 and _drops(node):
            _turn(node)
            modified = True
    if modified:
        _copy_where_views_need_it(module.graph)
    return PassResult(module, modified)


def _drops(site: fx.Node) -> bool:
    """Whether it drops in this graph; else it returns its input itself, under no_grad with the input's gradient."""
    known = notes(site).get("site")
    return not switched_off(site) and (known.rate if known is not None else argument(site, 1, "p", 0.5)) != 0


def _copy_where_views_need_it(graph: fx.Graph) -> None:
    """view(x, sizes) -> reshape(x, sizes): of a value that lies as it does in the model it is a view all the same."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "view" and "pinned" not in notes(node):
            sizes = node.args[1:] and not isinstance(node.args[1], torch.dtype)
            node.target = "reshape" if sizes else node.target


def _turn(site: fx.Node) -> None:
    emit = Emitter(site)
    source: Any = argument(site, 0, "input")
    users = list(site.users)
    site.replace_input_with(source, _turned(emit, source))
    notes(site)["val"] = fake_value("transpose", notes(site)["val"], 0, 1)
    notes(site)["steps_second"] = True
    behind = Emitter(site.next)
    back = None
    for user in users:
        if _turns(user):
            user.replace_all_uses_with(site)
        elif user.target is F.linear and user.args[0] is site:
            notes(user)["val"] = fake_value("transpose", notes(user)["val"], 0, 1)
            readers = list(user.users)
            turned = Emitter(user.next)("transpose", user, 0, 1)
            for reader in readers:
                reader.replace_input_with(user, turned)
        else:
            back = back or behind("transpose", site, 0, 1)
            user.replace_input_with(site, back)


def _turned(emit: Emitter, source: fx.Node) -> fx.Node:
    """source with steps leading."""
    if _turns(source):
        inner = source.args[0]
        assert isinstance(inner, fx.Node)
        return inner
    if op_name(source) == "embedding" and len(source.users) == 1 and isinstance(source.args[0], fx.Node):
        turned = Emitter(source)("transpose", source.args[0], 0, 1)
        source.replace_input_with(source.args[0], turned)
        notes(source)["val"] = fake_value("transpose", notes(source)["val"], 0, 1)
        return source
    return emit("transpose", source, 0, 1)


def _turns(node: fx.Node) -> bool:
    return op_name(node) == "transpose" and node.args[1:] == (0, 1)
