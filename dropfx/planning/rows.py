"""Which values of a region hold a site's groups: their rows are the site's leading axis times something, in order."""

from __future__ import annotations

from torch import fx

from dropfx.graph.axis_rules import RESHAPES, rule_of
from dropfx.graph.nodes import argument, op_name, value_of
from dropfx.graph.notes import UnitAxis
from dropfx.graph.op_families import GEMMS
from dropfx.graph.size_origin import Source, is_fixed, origin


def same_rows(operand: fx.Node, reader: fx.Node, axis: UnitAxis) -> bool:
    """Whether operand and reader agree in the axes before the unit axis; else the operand is broadcast."""
    value, out, rule = value_of(operand), value_of(reader), rule_of(reader)
    if rule is None or not rule.pointwise:
        return True
    return value is not None and out is not None and value.shape[: axis.dim] == out.shape[: axis.dim]


def same_leading(operand: fx.Node, reader: fx.Node) -> bool:
    """Whether operand and reader agree in the first axis, along which groups lie; else the operand is broadcast there.

    On later axes it may be broadcast: each row of the reader is in the group of the row that it reads.
    """
    value, out, rule = value_of(operand), value_of(reader), rule_of(reader)
    if rule is None or not rule.pointwise:
        return True
    return value is not None and out is not None and value.dim() == out.dim() and value.shape[:1] == out.shape[:1]


def leads_before(node: fx.Node, at: UnitAxis, site: fx.Node) -> bool:
    """Whether a node before the site, whose own first axis holds the groups, has them from its operands.

    The length of the site's leading axis can be asked before it.
    """
    value, rule = value_of(node), rule_of(node)
    if value is None or value.dim() + at.dim < 1:
        return False
    if rule is None:
        leads = op_name(node) in GEMMS
    elif op_name(node) in RESHAPES:
        leads = all(_whole_groups(operand, axis, site) for operand, axis in (rule.operands(node, at) or {}).items())
    else:
        leads = rule.leads(node) and any(same_rows(o, node, at) for o in node.all_input_nodes)
    return leads and length_before(node, at, site) is not None


def leads_behind(node: fx.Node, at: UnitAxis, site: fx.Node) -> bool:
    """Whether the first axis of a node after the site, of whose operands it does, holds the groups."""
    rule = rule_of(node)
    if op_name(node) in RESHAPES:
        return _whole_groups(node, at, site)
    return rule is not None and rule.leads(node)


def _whole_groups(node: fx.Node, at: UnitAxis, site: fx.Node) -> bool:
    """Whether each position of the site's leading axis has whole positions of the node's, in every call.

    The axes before the units are known to be the site's rows in order.
    """
    value, dropped = value_of(node), value_of(site)
    if value is None or dropped is None or value.dim() + at.dim < 1:
        return False
    if value.dim() + at.dim == 1 or origin(node, 0) == origin(site, 0):
        return True
    # of an empty batch nothing is known
    return is_fixed(node, 0) and is_fixed(site, 0) and bool(len(dropped)) and len(value) % len(dropped) == 0


def length_before(node: fx.Node, at: UnitAxis | None, site: fx.Node) -> Source | int | None:
    """The length of the site's leading axis: a number, or an axis of a value that comes before the node.

    Args:
        node: of the region, no later than the site.
        at: where it emits units compact, None where it only reads them so.
    """
    source, dropped = _rows_source(node, at), value_of(site)
    value = value_of(source)
    if source is not None and value is not None and dropped is not None and value.shape[:1] == dropped.shape[:1]:
        return source, 0
    found = origin(site, 0)
    return found if isinstance(found, int) or found[0] < node else None


def _rows_source(node: fx.Node, at: UnitAxis | None) -> fx.Node | None:
    """An operand whose first axis is the node's, if it is a tensor."""
    operands = [argument(node, 0, "input")] if op_name(node) in GEMMS else node.all_input_nodes
    alike = (o for o in operands if at is None or same_rows(o, node, at))
    return next((o for o in alike if value_of(o) is not None), None)
