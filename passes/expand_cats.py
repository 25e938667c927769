"""linear(cat([dropout(h), c], -1), W, b) -> linear(dropout(h), W[:, :n]) + linear(c, W[:, n:], b)

Features that are put next to a dropped value are not dropped with it. Each dropped part gets a product of its own,
whose weight is a view of some columns and is gathered like any other; what lies between dropped parts stays one
product. `join_cats` makes the product whole again where nothing gained.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch.nn import functional as F

from dropfx import ops
from dropfx.graph.emit import Emitter
from dropfx.graph.nodes import argument, op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.op_families import CATS
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.graph.size_origin import is_fixed
from dropfx.planning.regions import is_dropped


class Whole(NamedTuple):
    """What a sum of products was: the operands of one Linear."""

    joined: fx.Node
    parts: list[fx.Node]
    weight: fx.Node
    bias: fx.Node | None


def expand_cats(module: fx.GraphModule, context: Context) -> PassResult:
    """Take apart the products that read a dropped value next to others."""
    modified = False
    split: dict[Any, list[fx.Node]] = {}
    # tiles are dropped in the weights of Linears alone, as `record` hands them out
    for node in [] if context.options.pattern.drops_weights else list(module.graph.nodes):
        parts = _parts(node)
        if parts is not None:
            _expand(node, parts, split)
            modified = True
    return PassResult(module, modified)


def _parts(node: fx.Node) -> list[list[fx.Node]] | None:
    """The parts that a Linear reads side by side: a dropped one alone, those between them together."""
    if op_name(node) != "linear" or "pinned" in notes(node) or any(u.target is ops.recurrence_op for u in node.users):
        return None
    joined, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    value, matrix = value_of(joined), value_of(weight)
    if op_name(joined) not in CATS or value is None or matrix is None or matrix.dim() != 2 or value_of(node) is None:
        return None
    parts, dim = argument(joined, 0, "tensors"), argument(joined, 1, "dim", 0)
    if not isinstance(parts, (list, tuple)) or dim not in (-1, value.dim() - 1):
        return None
    values = [value_of(part) for part in parts]
    if any(v is None or v.dim() != value.dim() or v.dtype != value.dtype for v in values):
        return None
    if "pinned" in notes(weight) or "pinned" in notes(joined) or any("pinned" in notes(part) for part in parts):
        return None
    if sum(not is_fixed(part, value.dim() - 1) for part in parts) > 1:  # the weight tells the width of one
        return None
    return _grouped(parts)


def _grouped(parts: Any) -> list[list[fx.Node]] | None:
    groups: list[list[fx.Node]] = []
    last = False
    for part in parts:
        dropped = is_dropped(part)
        if groups and not dropped and not last:
            groups[-1].append(part)
        else:
            groups.append([part])
        last = dropped
    return groups if len(parts) > 1 and any(map(is_dropped, parts)) else None


def _expand(node: fx.Node, groups: list[list[fx.Node]], split: dict[Any, list[fx.Node]]) -> None:
    emit = Emitter(node)
    joined, weight, bias = (argument(node, place, name) for place, name in enumerate(("input", "weight", "bias")))
    widths = [sum(cast(torch.Tensor, value_of(part)).size(-1) for part in group) for group in groups]
    key = weight, tuple(widths), notes(node).get("after_effects")
    if key not in split:
        several = emit("split_with_sizes", weight, widths, 1)
        split[key] = [emit(operator.getitem, several, number) for number in range(len(groups))]
    products = []
    for number, (group, columns) in enumerate(zip(groups, split[key], strict=True)):
        x = group[0] if len(group) == 1 else emit(torch.cat, list(group), -1)
        products.append(emit(F.linear, x, columns, bias if number == 0 else None))
    total, sums = products[0], []
    for product in products[1:]:
        total = emit(torch.add, total, product)
        sums.append(total)
    for made in (*products, *sums):
        notes(made)["val"] = notes(node)["val"]  # under autocast of another type than what was emitted
    notes(total)["whole"] = Whole(joined, [part for group in groups for part in group], weight, bias), products, sums
    node.replace_all_uses_with(total)
    node.graph.erase_node(node)
