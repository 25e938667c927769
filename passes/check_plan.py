"""Where DROPFX_CHECK=1: compact values are those of sites with a pattern, on an axis of the units it was fitted to."""

from __future__ import annotations

from torch import Tensor, fx

from dropfx.graph.nodes import parts_of, value_of
from dropfx.graph.notes import Form, notes, sites_of
from dropfx.graph.pass_infra import Context, PassResult, checking


def check_plan(module: fx.GraphModule, context: Context) -> PassResult:
    """Raise where the plan contradicts the graph or the sites."""
    for node in module.graph.nodes if checking() else ():
        for index in sites_of(node):
            site = context.sites[index]
            assert site.rewritten, f"{node} is planned for {site.name}, which runs as written: {site.reason}"
        if (form := notes(node).get("form")) is not None:
            assert "pinned" not in notes(node), f"{node} is compact, and its memory is written to"
            assert node.op != "placeholder", f"{node} is compact, and comes from outside"
            _check_axis(node, form, context)
        for operand, form in notes(node).get("reads", {}).items():
            assert operand in node.all_input_nodes, f"{node} reads {operand}, which is no operand of it"
            _check_axis(operand, form, context)
    return PassResult(module, False)


def _check_axis(node: fx.Node, form: Form, context: Context) -> None:
    fit = context.sites[form.site].fit
    assert fit is not None, f"{node} has a form by a site without a pattern"
    parts: list[Tensor] | None = parts_of(node)
    for value in parts if parts is not None else [value_of(node)]:
        assert value is not None, f"{node} has a form, and no value"
        units = value.shape[form.axis.dim]
        assert units == fit.units * form.axis.factor, f"{node} has {units} places on {form.axis}, its site {fit.units}"
