"""time_major on graphs built by hand: steps of a batch-first network lead, and what is behind gets what it had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dropfx.graph.device_costs import DEVICES
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context
from dropfx.options import make_options
from dropfx.passes.time_major import time_major


def run(
    *, groups: Any = "time", time_axis: int | None = 1, shape: tuple[int, ...] = (3, 5, 8), pinned: bool = False
) -> tuple[fx.Graph, fx.Node, bool]:
    """graph(x, w) -> (linear(dropout(x), w), dropout(x) + 1), and the dropout; whether the pass changed it."""
    graph, mode = fx.Graph(), FakeTensorMode()
    with mode:
        values = torch.empty(shape), torch.empty(4, 8)
    x, w = (graph.placeholder(name) for name in "xw")
    site = graph.call_function(F.dropout, (x, 0.5))
    linear, total = graph.call_function(F.linear, (site, w)), graph.call_method("add", (site, 1))
    graph.output((linear, total))
    with mode:
        product = F.linear(*values)
    for node, value in zip((x, w, site, linear, total), (*values, values[0], product, values[0]), strict=True):
        notes(node)["val"] = value
    if pinned:
        notes(site)["pinned"] = True
    context = Context(make_options(groups=groups), DEVICES["cpu"], time_axis=time_axis)
    _, modified = time_major(fx.GraphModule({}, graph), context)
    return graph, site, modified


def test_steps_lead_and_readers_get_what_they_had() -> None:
    graph, site, modified = run()
    assert modified
    assert notes(site)["steps_second"]
    assert notes(site)["val"].shape == (5, 3, 8)
    (linear,) = [node for node in graph.nodes if node.target is F.linear]
    assert linear.args[0] is site  # a product does not care which axis leads
    assert notes(linear)["val"].shape == (5, 3, 4)
    x, w = torch.randn(3, 5, 8), torch.randn(4, 8)
    torch.manual_seed(0)
    dropped = F.dropout(x.transpose(0, 1), 0.5).transpose(0, 1)
    torch.manual_seed(0)
    product, total = fx.GraphModule({}, graph)(x, w)
    torch.testing.assert_close(product, F.linear(dropped, w))
    torch.testing.assert_close(total, dropped + 1)


@pytest.mark.parametrize(
    "given", [{"groups": 2}, {"time_axis": 0}, {"time_axis": None}, {"shape": (5, 8)}, {"pinned": True}], ids=str
)
def test_what_stays(given: dict[str, Any]) -> None:
    graph, site, modified = run(**given)
    assert not modified
    assert "steps_second" not in notes(site)
    assert not [node for node in graph.nodes if node.target == "transpose"]
