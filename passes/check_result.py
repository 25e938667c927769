"""Where DROPFX_CHECK=1: what a draw decides is read, and the dropouts in whose place it is are gone."""

from __future__ import annotations

from torch import fx

from dropfx.graph.pass_infra import Context, PassResult, checking


def check_result(module: fx.GraphModule, context: Context) -> PassResult:
    """Raise where a draw has no readers, or its dropout still drops."""
    nodes = set(module.graph.nodes) if checking() else set()
    for index, draw in context.draws.items() if checking() else ():
        site = context.sites[index]
        assert site.rewritten, f"{site.name} is drawn, and runs as written: {site.reason}"
        assert any(node in nodes and node.users for node in draw.values()), f"nothing reads the draw of {site.name}"
        assert site.node not in nodes or context.options.pattern.drops_weights, f"{site.name} still drops as written"
    return PassResult(module, False)
