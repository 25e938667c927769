"""The branch of a row site: what can run on the kept rows alone, and what that costs and saves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dropfx.graph.axis_rules import UnitAxis, samples_of_operands
from dropfx.graph.nodes import is_parameter, op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context
from dropfx.planning.cost_model import is_costly, node_times
from dropfx.planning.row_masks import RowMask


@dataclass
class Branch:
    """The nodes that run on kept rows, back from what the site drops.

    Attributes:
        axes: node -> the axis of its samples, in the order of the graph.
        reads: node -> its operands that have samples, with their axes.
        inputs: operands from outside of the branch, of which the kept rows are taken.
        ends: why it goes no further, in the order of the graph.
    """

    axes: dict[fx.Node, UnitAxis] = field(default_factory=dict)
    reads: dict[fx.Node, dict[fx.Node, UnitAxis]] = field(default_factory=dict)
    inputs: dict[tuple[fx.Node, UnitAxis], None] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)


def grow(mask: RowMask, at: UnitAxis) -> Branch:
    """The largest branch: every node whose readers all are in it, and that keeps samples apart."""
    branch = Branch()
    asked: dict[fx.Node, UnitAxis] = {mask.x: at}
    dead = feeding(mask)
    found: list[tuple[fx.Node, UnitAxis, dict[fx.Node, UnitAxis]]] = []
    for node in reversed(list(mask.product.graph.nodes)):
        if node not in asked or node in branch.axes:
            continue
        readers = [user for user in node.users if user not in dead and op_name(user) != "size"]
        inside = all((user in mask.body or branch.reads.get(user, {}).get(node) == asked[node]) for user in readers)
        operands = None if not inside or is_outside(node) else samples_of_operands(node, asked[node])
        axes = [(node, asked[node]), *(operands or {}).items()]
        if operands is None or not all(_same_samples(value, axis, mask.product, at) for value, axis in axes):
            if not is_outside(node):
                others = [user for user in readers if user not in branch.axes and user not in mask.body]
                mixing = next(iter(others), node)
                branch.ends.insert(0, f"{op_name(mixing) or mixing.target} is not known to keep samples apart")
            continue
        if any(asked.get(operand, axis) != axis for operand, axis in operands.items()):
            continue  # another reader has the samples on another axis
        branch.axes[node], branch.reads[node] = asked[node], operands
        asked.update(operands)
        found.insert(0, (node, asked[node], operands))
    branch.axes = {node: axis for node, axis, _ in found}
    readings = [*branch.reads.values(), {mask.x: at}]
    branch.inputs = {
        (operand, axis): None for reads in readings for operand, axis in reads.items() if operand not in branch.axes
    }
    return branch


def is_outside(node: fx.Node) -> bool:
    """What no branch can have in it: inputs, and values that are written to in place."""
    return node.op not in ("call_function", "call_method") or is_parameter(node) or "pinned" in notes(node)


def feeding(mask: RowMask) -> set[fx.Node]:
    """What nothing but the mask reads: it goes with it."""
    dead = set(mask.chain)
    first = mask.chain[0]
    for node in reversed(list(first.graph.nodes)):
        read = node.op in ("call_function", "call_method") and node.users and node < first
        if read and "effect" not in notes(node) and dead.issuperset(node.users):
            dead.add(node)
    return dead


def _same_samples(node: fx.Node, axis: UnitAxis, product: fx.Node, at: UnitAxis) -> bool:
    """Whether the axis is as long as the batch times its factor in every call, not in the traced one alone."""
    traced, batch = node.meta.get("example_value"), product.meta.get("example_value")
    if not isinstance(batch, torch.Tensor):
        return True
    length: Any = batch.shape[at.dim]
    if type(length) is int:
        return True
    if isinstance(traced, (tuple, list)):
        return all(isinstance(t, torch.Tensor) and _agree(t.shape[axis.dim], length, axis.factor) for t in traced)
    return isinstance(traced, torch.Tensor) and _agree(traced.shape[axis.dim], length, axis.factor)


def _agree(size: Any, length: Any, factor: int) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr == length.node.expr * factor)


def worth(branch: Branch, mask: RowMask, rate: float, context: Context) -> tuple[float, float]:
    """Seconds of the branch and of what makes and adds its rows, forward and backward: as written, on kept rows."""
    costs, dropped = context.costs, value_of(mask.x)
    assert dropped is not None
    keep = 1 - rate
    inside = sum(node_times(node, context)[0] for node in branch.axes)
    # the mask's product, forward and backward; the sum after it costs the same
    written = inside + 2 * costs.move(dropped.numel(), dropped.element_size())
    moved = costs.draw
    for operand, _ in branch.inputs:
        value = value_of(operand)
        if value is not None:
            size = value.element_size()
            # forward reads and writes the kept rows; backward fills zeros, puts these, and adds them to the rest
            moved += costs.move(value.numel() * keep, size) + costs.move(value.numel(), size, 3 + keep)
    moved += 2 * costs.move(dropped.numel() * keep, dropped.element_size())
    return written, inside * keep + moved + costs.launch * len(branch.axes) * rate


def saves_work(branch: Branch) -> bool:
    """Whether a product of matrices, or the like, is in it, of something that differs from sample to sample."""
    return bool(branch.inputs) and any(map(is_costly, branch.axes))
