"""dropfx::op -> what executes it, from the front end and the lowering asked for, measured or predicted."""

from __future__ import annotations

from typing import Any

from torch import fx

from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, PassResult
from dropfx.ops import EAGER
from dropfx.ops.triton_available import why_no_kernels
from dropfx.planning.lowering import choose


def lower(module: fx.GraphModule, context: Context) -> PassResult:
    """Triton's ops where they are asked for or faster.

    Of the others eager graphs call the autograd functions, which dispatch faster; compilers keep the registered ops.
    """
    table: dict[Any, Any] = EAGER if context.eager else {}
    kernels = _kernels(context)
    modified = False
    for node in module.graph.nodes:
        if node.target not in EAGER:
            continue
        target = table.get(node.target, node.target)
        candidates = {"aten": target} | ({"triton": kernels[node.target]} if node.target in kernels else {})
        choice = choose(node, candidates, context)
        if choice.reason:
            context.lowerings[_label(node, context)] = f"{choice.lowering}, {choice.reason}"
        if choice.lowering == "triton":
            target, notes(node)["lowering"] = candidates["triton"], "triton"
        if target is not node.target:
            node.target = target
            modified = True
    return PassResult(module, modified)


def _kernels(context: Context) -> dict[Any, Any]:
    """Op -> its twin by Triton, where these may be taken: asking for them imports Triton."""
    asked = context.options.lowering
    devices = {site.device for site in context.sites if site.rewritten}
    if asked == "triton" or (asked == "auto" and any(not why_no_kernels(device) for device in devices)):
        from dropfx.ops.triton_ops import KERNELS

        return KERNELS
    return {}


def _label(node: fx.Node, context: Context) -> str:
    """The op and the sites by whose draws it is gathered, for `explain`."""
    forms = [*notes(node).get("reads", {}).values(), notes(node).get("form")]
    numbers = [form.site for form in forms if form is not None]
    numbers += [index for index, draw in context.draws.items() if {*draw.values()} & {*node.all_input_nodes}]
    names = dict.fromkeys(context.sites[number].name for number in numbers)
    name = " ".join([str(node.target).split(".")[1], *names])
    taken = sum(label.partition(" #")[0] == name for label in context.lowerings)
    return f"{name} #{taken + 1}" if taken else name
