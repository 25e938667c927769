"""List the graph's dropouts: axis, rate, and the pattern fitted to each, or the reason why it runs as written."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from dropfx.graph.axis_rules import COPIES, rule_of
from dropfx.graph.dropout_ops import DROPOUT_FUNCTIONS, OTHER_DROPOUTS, Call, OtherDropout
from dropfx.graph.layers import pointwise, unit_dim
from dropfx.graph.nodes import argument, is_parameter, mark_gradients, op_name, value_of
from dropfx.graph.notes import Dropping, notes
from dropfx.graph.pass_infra import Context, PassResult, Site, Within
from dropfx.ops.rows import dropout_of_rows
from dropfx.ops.shared_dropout import shared_dropout
from dropfx.patterns import PatternRefused
from dropfx.planning.draw_count import draw_count
from dropfx.planning.regions import recurrent_weight

_UNBATCHED_RANK = {-2: 3, -3: 4, -4: 5}
"""Axis of a channel dropout -> rank of its batched input; PyTorch reads other ranks in other ways."""


def find_sites(module: fx.GraphModule, context: Context) -> PassResult:
    """Fill context.sites in graph order, and note which dropouts drop nothing; no operation changes."""
    mark_gradients(module.graph)
    for node in module.graph.nodes:
        if "by_rows" in notes(node):
            continue
        if node.op == "call_function" and node.target in DROPOUT_FUNCTIONS:
            context.sites.append(_site(node, context))
        elif node.op == "call_function" and node.target in OTHER_DROPOUTS:
            other = OTHER_DROPOUTS[node.target]
            if rate := _rate_of_other(node, other):
                call = notes(node).get("other", Call(f":{op_name(node)}"))
                context.sites.append(Site(call, rate, reason=other.reason))
    return PassResult(module, False)


def _site(node: fx.Node, context: Context) -> Site:
    known = notes(node).get("site", Dropping(Call(node.name), argument(node, 1, "p", 0.5)))
    rate = known.rate
    numeric = isinstance(rate, (int, float))
    site = Site(known.call, float(rate) if numeric else 0.0, known.live, node, _axis(node, context))
    site.pattern = context.options.pattern
    if node.target is dropout_of_rows:
        rows, dim, factor = node.args[2:5]
        number = next(index for index, draw in context.draws.items() if draw.get("rows") is rows)
        site.within = Within(number, dim, factor)  # type: ignore[arg-type]
    site.reason = _refusal(node, site, context) if numeric else "its rate is known only when the graph runs"
    # whatever it would drop by, its neighbours' units pass through it; a mask made by hand is drawn all the same
    notes(node)["identity"] = (
        rate == 0 and numeric and node.target is not shared_dropout and "pinned" not in notes(node)
    )
    value = value_of(node)
    if not site.reason and value is not None:
        site.device, site.dtype, site.rank = value.device, value.dtype, value.dim()
        site.leading, site.steps_second = value.size(0), notes(node).get("steps_second", False)
        if context.options.pattern.drops_weights:  # fitted to the weights after it
            return site
        site.groups = _groups(site, context)
        try:
            site.fit = context.options.pattern.fit(value.shape[site.axis], site.rate, site.groups)
        except PatternRefused as refusal:
            site.reason = str(refusal)
    return site


def _axis(node: fx.Node, context: Context) -> int:
    """The axis of a site's units, counted from the end.

    That of the channels where single elements of an image are dropped between convolutions of 1x1, which are Linears
    over the channels; of a mask made by hand the last one that has values of its own.
    """
    axis, value = DROPOUT_FUNCTIONS[node.target], value_of(node)
    if axis != -1 or value is None or context.options.pattern.drops_weights:
        return axis
    if node.target is shared_dropout:
        own = [d for d, same in enumerate(argument(node, 2, "shared")) if not same]
        return own[-1] - value.dim() if own else axis
    return next((unit_dim(layer) for layer in _layers_around(node) if pointwise(layer)), axis)


def _layers_around(node: fx.Node) -> Iterator[fx.Node]:
    """The operations before and behind what works element by element around a site; those behind come first."""
    for behind in (True, False):
        pending, seen = [node], {node}
        while pending:
            at = pending.pop()
            for other in list(at.users) if behind else at.all_input_nodes:
                rule = rule_of(other)
                if rule is None:
                    yield other
                elif other not in seen and (rule.pointwise or op_name(other) in COPIES):
                    seen.add(other)
                    pending.append(other)


def _refusal(node: fx.Node, site: Site, context: Context) -> str:
    source = argument(node, 0, "input")
    value = value_of(node)
    if not 0 < site.rate < 1:
        return f"its rate is {site.rate:g}"
    if "pinned" in notes(node):
        return "it writes in place into memory that is read elsewhere"
    if value is None or value_of(source) is None:
        return "its input's shape is known only when the graph runs"
    if node.target is shared_dropout and (reason := _one_mask(node, context)):
        return reason
    if context.options.pattern.drops_weights:
        if drops_recurrent_weight(node):
            return "it drops the recurrent weight W_hh, which pattern='tile' cannot; 'block', 'slice' and 'row' can"
        return "" if site.axis == -1 else "it drops whole channels, which pattern='tile' cannot"
    if isinstance(source, fx.Node) and is_parameter(source) and not drops_recurrent_weight(node):
        return "it drops a weight, which patterns of units cannot; pattern='tile' can"
    if drops_recurrent_weight(node) and value.dim() == 2:
        return ""
    if value.dim() < 1 or value.dim() != _UNBATCHED_RANK.get(site.axis, value.dim()):
        return f"this dropout is not rewritten for an input of {value.dim()} dimension(s)"
    if context.options.along_rows and value.dim() + site.axis < 1:
        return "groups are chunks of a leading axis, and its input has none"
    return ""


def drops_recurrent_weight(site: fx.Node) -> bool:
    """Whether the dropped value is the weight W_hh of a recurrence: there is one of it for all rows and steps."""
    return any(recurrent_weight(user) is site for user in site.users)


def _groups(site: Site, context: Context) -> int:
    """Draws per call: one per time step of [T, B, units]; in a loop over time steps each call draws anyway."""
    if site.node is not None and drops_recurrent_weight(site.node):
        return 1
    if context.options.as_needed:
        return _draws_needed(site, context)
    if isinstance(context.options.groups, int):
        return context.options.groups
    by_step = context.time_axis is not None and site.rank == 3 and site.axis == -1
    return site.leading if by_step and not _lasts(site, context) else 1


def _draws_needed(site: Site, context: Context) -> int:
    """As many as keep what PyTorch's own masks do, of which it draws one for each position beside the unit axis."""
    node, value = site.node, value_of(site.node)
    assert node is not None
    assert value is not None
    units = value.dim() + site.axis
    shared = [d > units and DROPOUT_FUNCTIONS[node.target] != -1 for d in range(value.dim())]
    if node.target is shared_dropout:
        shared = list(argument(node, 2, "shared"))
        if shared[0]:
            return 1
    lengths = [length for d, length in enumerate(value.shape) if d != units and not shared[d]]
    return draw_count(math.prod(lengths), site.leading, site.rate, str(context.options.groups)) if lengths else 1


def _lasts(site: Site, context: Context) -> bool:
    """Whether its mask is made by hand for all time steps; where the batch is first such sites are not turned."""
    by_hand = site.node is not None and site.node.target is shared_dropout
    return by_hand and (context.time_axis == 1 or bool(argument(site.node, 2, "shared")[0]))  # type: ignore[arg-type]


def _one_mask(node: fx.Node, context: Context) -> str:
    """Why a mask that positions share cannot be drawn by the pattern."""
    if context.options.pattern.drops_weights:
        return "its mask is made by hand; pattern='tile' replaces calls of dropout alone"
    shared = argument(node, 2, "shared")
    if context.options.along_rows and shared[0]:
        return "it has one mask for its whole leading axis, and groups would need several"
    return ""


def _rate_of_other(node: fx.Node, other: OtherDropout) -> float:
    """The rate at which a function of OTHER_DROPOUTS drops, as far as its arguments tell; 0: not at all."""
    rate = argument(node, *other.rate)
    live = other.training is None or argument(node, *other.training) is True
    return float(rate) if live and isinstance(rate, (int, float)) else 0.0
