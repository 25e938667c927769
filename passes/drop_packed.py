"""pack_padded_sequence(dropout(x), lengths) -> dropout(pack_padded_sequence(x, lengths))        units are the same

Packing orders rows and leaves out padding; behind it the site meets the product of the recurrent layer. Only with one
draw a batch, which all rows share: groups are chunks of the rows as the model has them.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from dropfx.graphs import argument, op_name, value_of
from dropfx.pass_infra import Context, PassResult
from dropfx.shared_dropout import shared_dropout
from dropfx.sites import DROPOUT_FUNCTIONS


def drop_packed(module: fx.GraphModule, context: Context) -> PassResult:
    """Move each dropout that only a packing reads behind it."""
    modified = False
    for node in list(module.graph.nodes):
        if node.target is torch._pack_padded_sequence and not context.options.grouped:
            site = _site_before(node)
            data = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
            if site is not None and len(data) == 1:
                _move(site, data[0])
                modified = True
    return PassResult(module, modified)


def _site_before(packing: fx.Node) -> fx.Node | None:
    """The dropout of features whose result goes into the packing alone, or is but ordered before."""
    source = argument(packing, 0, "input")
    while isinstance(source, fx.Node) and len(source.users) == 1 and "pinned" not in source.meta:
        value = value_of(source)
        if source.op == "call_function" and DROPOUT_FUNCTIONS.get(source.target) == -1:
            by_hand = source.target is shared_dropout  # which names the axes along which its mask is one
            return source if value is not None and value.dim() > 2 and not by_hand else None
        if op_name(source) != "index_select" or value is None or argument(source, 1, "dim") in (-1, value.dim() - 1):
            return None
        source = source.args[0]
    return None


def _move(site: fx.Node, data: fx.Node) -> None:
    before = argument(site, 0, "input")
    site.replace_all_uses_with(before)
    readers = list(data.users)
    data.append(site)
    site.replace_input_with(before, data)
    site.meta["val"] = data.meta["val"]
    for reader in readers:
        reader.replace_input_with(data, site)
