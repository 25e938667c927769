"""What the front end and the passes note on nodes for those that come after them: all keys of `node.meta`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, cast

from torch import fx

from dropfx.graph.dropout_ops import Call


@dataclass(frozen=True)
class UnitAxis:
    """Where a site's units lie in a value: axis `dim` (negative), `factor` neighbouring positions per unit."""

    dim: int
    factor: int = 1


@dataclass(frozen=True)
class Form:
    """Compact on axis `axis`, by the draw of site number `site`."""

    site: int
    axis: UnitAxis


class Dropping(NamedTuple):
    """What drops: its name, its rate where that is known, and the rate's number where a call brings it along."""

    call: Call
    rate: Any
    live: int | None = None


class Notes(TypedDict, total=False):
    """Who writes a note, and what it says. Copies of a node take its notes along.

    val: front end, then every pass that makes a node: the fake value of the *dense* result; None where unknown.
    parameter: front end: the node is a parameter.
    effect: front end: no value, but a mode that is set, or an assertion; it stays where it is.
    after_effects: front end: how many of those lie before the node, past which nothing may be moved.
    site, recurrent: front end: a dropout, a recurrent function with dropouts between its layers.
    bernoulli, other: front end: the name of a draw that may make a mask, of a dropout that runs as written.
    by_rows: skip_rows: what draws a mask of rows that runs as written.
    pinned: functionalize: its memory is written to in place; no pass makes it compact or reads it elsewhere.
    functional: functionalize, of its own: made of a write in place just now.
    steps_second: time_major: a site whose steps lie on the second axis in the model.
    identity: find_sites: a dropout of rate 0.
    whole: expand_cats, for join_cats: the Linear whose sum of products this is.
    asks_gradient: nodes.mark_gradients: a backward through it would reach a leaf that asks for a gradient.
    one_piece: plan_regions: a recurrence that PyTorch has fused on the device.
    form: plan_regions: the node emits compact values. Until rewrite_sites the only sign of it.
    reads: plan_regions: operand -> the form in which the node reads it; dense where it is not named.
    tiles: plan_tiles: the Linear's weight drops tiles, by the draw of the site of this number.
    lowering: lower: "triton" where a kernel was chosen.
    """

    val: Any
    parameter: bool
    effect: bool
    after_effects: int
    site: Dropping
    recurrent: Dropping
    bernoulli: Call
    other: Call
    by_rows: bool
    pinned: bool
    functional: bool
    steps_second: bool
    identity: bool
    whole: tuple[Any, list[fx.Node], list[fx.Node]]
    asks_gradient: bool
    one_piece: bool
    form: Form
    reads: dict[fx.Node, Form]
    tiles: int
    lowering: str


def notes(node: Any) -> Notes:
    """The notes on a node, to read and to write."""
    return cast(Notes, node.meta)


def sites_of(node: fx.Node) -> set[int]:
    """Numbers of the sites by whose draws the plan made a node compact, or made it read compact."""
    forms = [notes(node).get("form"), *notes(node).get("reads", {}).values()]
    return {form.site for form in forms if form is not None}


def forms_of(node: fx.Node) -> tuple[Form | None, Form | None]:
    """What a node of one compact operand reads, and what it emits; None where dense."""
    return next(iter(notes(node).get("reads", {}).values()), None), notes(node).get("form")
