"""Regions: the part of the graph around a site that could be computed compact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx

from dropfx import ops
from dropfx.graph.axis_rules import Operands, rule_of
from dropfx.graph.dropout_ops import DROPOUT_FUNCTIONS
from dropfx.graph.layers import conv_groups, multiplies, unit_dim
from dropfx.graph.nodes import argument, is_parameter, op_name, value_of
from dropfx.graph.notes import UnitAxis, notes
from dropfx.graph.op_families import CONVOLUTIONS, GEMMS, SUMS
from dropfx.graph.pass_infra import Site
from dropfx.graph.size_origin import is_fixed, origin
from dropfx.planning.batch_statistics import reached_statistic
from dropfx.planning.rows import leads_before, leads_behind, same_leading, same_rows

_RECURRENT_WEIGHT = 4  # its place among the arguments of a recurrence
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
_SOFTMAX = ("softmax", "_softmax", "log_softmax")


class RegionRefused(Exception):
    """The site cannot be rewritten at all; the message is the reason for `explain`."""


@dataclass
class Region:
    """Everything around a site that may be compact.

    Attributes:
        site: the site's dropout node.
        forms: compact-capable value -> where the units lie in it (producers, unit-wise nodes, the site).
        wants: node -> operand -> the form in which it reads that operand when it is compact.
        before: the nodes of `forms` that precede the site.
        sinks: consumers, which read compact and emit dense: Linear, convolution, recurrence of a dropped weight,
            residual add.
        probabilities: the site drops the outcome of a softmax over its units.
        grouped: the draws differ along the site's first axis.
        straight: values whose first axis is the site's, or whole positions of it.
        ends_before, ends_behind: the operations before and after the site at which it ends, for `explain`.
    """

    site: fx.Node
    forms: dict[fx.Node, UnitAxis] = field(default_factory=dict)
    wants: dict[fx.Node, dict[fx.Node, UnitAxis]] = field(default_factory=dict)
    before: set[fx.Node] = field(default_factory=set)
    sinks: set[fx.Node] = field(default_factory=set)
    probabilities: bool = False
    grouped: bool = False
    straight: set[fx.Node] = field(default_factory=set)
    ends_before: list[fx.Node] = field(default_factory=list)
    ends_behind: list[fx.Node] = field(default_factory=list)

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """All of its operations: those that emit the units compact, then those that read them only."""
        yield from self.forms
        yield from (s for s in self.sinks if s not in self.forms)


def grow(module: fx.GraphModule, site: Site, taken: set[fx.Node]) -> Region:
    """The region of a site; nodes in `taken` are compact for another one and count as dense here.

    Raises:
        RegionRefused: something after the site forbids a draw that the batch shares.
    """
    assert site.node is not None
    if reason := reached_statistic(module, site.node, site.axis):
        raise RegionRefused(reason)
    region = Region(site.node, straight={site.node})
    region.forms[site.node] = UnitAxis(site.axis)
    region.grouped = site.fit is not None and site.fit.groups > 1
    source = site.node.args[0] if site.node.args else site.node.kwargs["input"]
    assert isinstance(source, fx.Node)
    region.wants[site.node] = {source: UnitAxis(site.axis)}
    _grow_before(region, source, UnitAxis(site.axis), taken)
    _grow_after(region, taken)
    return region


def _grow_before(region: Region, source: fx.Node, axis: UnitAxis, taken: set[fx.Node]) -> None:
    pending = [(source, axis)]
    while pending:
        node, at = pending.pop()
        if node in region.forms:
            continue
        region.probabilities |= op_name(node) in _SOFTMAX and _over_units(node, at)
        operands = None if node in taken or "pinned" in notes(node) else _compact_before(region, node, at)
        if operands is None:
            region.ends_before.append(node)
            continue
        region.forms[node] = at
        region.wants[node] = operands
        region.before.add(node)
        pending += [(o, axis) for o, axis in operands.items() if not region.grouped or same_rows(o, node, axis)]


def _compact_before(region: Region, node: fx.Node, at: UnitAxis) -> Operands | None:
    """The operands that node reads compact where it emits its units at `at` compact; None where it must be dense."""
    if drops(node) or (region.grouped and not leads_before(node, at, region.site)):
        return None
    rule = rule_of(node)
    if rule is None and op_name(node) in GEMMS:
        gatherable = at == UnitAxis(unit_dim(node)) and _gatherable(node) and _cuts_rows(region, node)
        return region.wants.get(node, {}) if gatherable else None
    operands = None if rule is None else rule.operands(node, at)
    merges = operands is not None and any(axis.factor > at.factor for axis in operands.values())
    return None if merges and not _fixed_behind(node, at) else operands


def is_dropped(value: Any) -> bool:
    """Whether a value comes from a dropout, through operations that keep its units."""
    pending, seen = [value], set[fx.Node]()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.op == "call_function" and node.target in DROPOUT_FUNCTIONS:
            return True
        if rule_of(node) is not None:
            pending += cast(list[Any], node.all_input_nodes)
    return False


def _over_units(node: fx.Node, axis: UnitAxis) -> bool:
    dim, value = argument(node, 1, "dim"), value_of(node)
    return isinstance(dim, int) and value is not None and dim % value.dim() == value.dim() + axis.dim


def _gatherable(node: fx.Node) -> bool:
    """Whether the arguments of one of GEMMS are such that its weight can be gathered."""
    return _plain_embedding(node) if op_name(node) == "embedding" else multiplies(node)


def _cuts_rows(region: Region, layer: fx.Node) -> bool:
    """Whether a layer can multiply each group of rows by itself: a convolution cuts its first axis as the site does."""
    alike = op_name(layer) not in CONVOLUTIONS or origin(layer, 0) == origin(region.site, 0)
    return alike or not region.grouped


def _plain_embedding(node: fx.Node) -> bool:
    plain = (("max_norm", 3, None), ("scale_grad_by_freq", 5, False), ("sparse", 6, False))
    return all(argument(node, place, name, default) == default for name, place, default in plain)


def _grow_after(region: Region, taken: set[fx.Node]) -> None:
    zeros = {region.site}
    for node in _after(region.site):
        read = [o for o in node.all_input_nodes if o in zeros]
        if not read:
            continue
        if region.probabilities and op_name(node) in _PRODUCTS:
            raise RegionRefused("it drops attention probabilities: no weight multiplies their units, activations do")
        free = not ("pinned" in notes(node) or drops(node))
        if free and multiplies(node):
            _layer_consumer(region, node, read)
        elif free and node not in taken and recurrent_weight(node) in read:
            _recurrent_consumer(region, node, read)
        elif free and node not in taken and (found := _unitwise_after(region, node, read, zeros)) is not None:
            region.forms[node], region.wants[node] = found
            zeros.add(node)
            if _straight(region, node, region.forms[node], read):
                region.straight.add(node)
        elif free and node not in taken and _takes_residual(node, read, region):
            region.sinks.add(node)
            region.wants[node] = {read[0]: region.forms[read[0]]}
        if node not in zeros and not (multiplies(node) and node in region.sinks):
            region.ends_behind.append(node)


def _after(site: fx.Node) -> Iterator[fx.Node]:
    node = site.next
    while node.op != "root":
        yield node
        node = node.next


def _layer_consumer(region: Region, node: fx.Node, read: list[fx.Node]) -> None:
    source = argument(node, 0, "input")
    if read != [source] or not _cuts_rows(region, node):
        return
    if region.forms[source].dim != unit_dim(node):
        if op_name(node) == "linear":
            raise RegionRefused("a Linear after it sums over another axis than the one whose units it drops")
        return
    region.sinks.add(node)
    region.wants[node] = {source: region.forms[source]}


def is_product(node: fx.Node) -> bool:
    """Whether it has work that compact operands spare."""
    return op_name(node) in GEMMS or node.target is ops.recurrence_op


def recurrent_weight(node: fx.Node) -> fx.Node | None:
    """The weight W_hh of a recurrence, None for any other node."""
    return cast(fx.Node, node.args[_RECURRENT_WEIGHT]) if node.target is ops.recurrence_op else None


def _recurrent_consumer(region: Region, node: fx.Node, read: list[fx.Node]) -> None:
    (weight, *others), at = read, region.forms[read[0]]
    if not others and node.args.count(weight) == 1 and not region.grouped:
        region.sinks.add(node)
        region.wants[node] = {weight: at}


def _unitwise_after(
    region: Region, node: fx.Node, read: list[fx.Node], zeros: set[fx.Node]
) -> tuple[UnitAxis, Operands] | None:
    """Where the units of an operation of units lie, and what it reads compact; None where it is none or mixes them."""
    rule = rule_of(node)
    if rule is None or not rule.zero(node, zeros):
        return None
    found = {rule.output(node, operand, region.forms[operand]) for operand in read}
    at = found.pop()
    operands = None if found or at is None else rule.operands(node, at)
    if operands is None or at is None or any(operands.get(operand) != region.forms[operand] for operand in read):
        return None
    if any(at.factor > region.forms[o].factor and not _fixed_behind(o, region.forms[o]) for o in read):
        return None
    if region.grouped and not _keeps_groups(region, node, at, read):
        return None
    return at, operands


def _fixed_behind(node: fx.Node, axis: UnitAxis) -> bool:
    """Whether the sizes after an axis are the same in every call: merged with it, they are numbers of the plan."""
    value = value_of(node)
    return value is not None and all(is_fixed(node, value.dim() + dim) for dim in range(axis.dim + 1, 0))


def _keeps_groups(region: Region, node: fx.Node, at: UnitAxis, read: list[fx.Node]) -> bool:
    """Whether the rows of a node after the site are the site's, in order."""
    rule = rule_of(node)
    assert rule is not None
    straight = _straight(region, node, at, read) or not rule.moves_rows
    return straight and all(same_leading(o, node) for o in read)


def _straight(region: Region, node: fx.Node, at: UnitAxis, read: list[fx.Node]) -> bool:
    """Whether the first axis of a node after the site holds whole groups."""
    return region.straight.issuperset(read) and leads_behind(node, at, region.site)


def drops(node: fx.Node) -> bool:
    """Whether it is a site, of another rate than 0."""
    return "site" in notes(node) and not notes(node).get("identity")


def ends(region: Region) -> str:
    """What lies around a region that holds no product, for `explain`: " (before it: conv2d; after it: layer_norm)"."""
    sides = [("before", region.ends_before), ("after", region.ends_behind)]
    named = [(side, dict.fromkeys(_named(region, node) for node in nodes)) for side, nodes in sides]
    text = "; ".join(f"{side} it: {', '.join(names)}" for side, names in named if names)
    return f" ({text})" if text else ""


def _named(region: Region, node: fx.Node) -> str:
    if drops(node):
        return "another dropout"
    plain = {"placeholder": "an input", "output": "the output"}
    if is_parameter(node):
        return "a parameter"
    if node.op in plain:
        return plain[node.op]
    if node.op == "call_module":
        return str(node.target)
    name, rule = op_name(node), rule_of(node)
    if name == "linear":
        return "a Linear along another axis"
    if name in CONVOLUTIONS and conv_groups(node) != 1:
        return f"{name} of {conv_groups(node)} groups"
    if multiplies(node) and node not in region.forms and node not in region.sinks:
        return f"{name} along other axes"
    if rule is not None and rule.moves_rows:
        return f"{name}, which cuts or moves the {'groups or the units' if region.grouped else 'units'}"
    return name or str(getattr(node.target, "__name__", node.target))


def residual_base(node: fx.Node, branch: fx.Node) -> Any:
    """The other addend of a two-operand sum."""
    return node.args[1] if node.args[0] is branch else node.args[0]


def _takes_residual(node: fx.Node, read: list[fx.Node], region: Region) -> bool:
    """Whether node is `base + read` (or base - read), a sum that can add the kept units alone."""
    name, branch = op_name(node), read[0]
    if name not in SUMS or len(node.args) != 2 or len(read) != 1:
        return False
    if name != "add" and node.args[1] is not branch:
        return False
    base, alpha, at = residual_base(node, branch), node.kwargs.get("alpha", 1), region.forms[branch]
    out, value = value_of(node), value_of(branch)
    if base is branch or value_of(base) is None or out is None or value is None:
        return False
    if region.grouped and out.shape != value.shape:
        return False
    return isinstance(alpha, (int, float)) and out.shape[at.dim] == value.shape[at.dim]
