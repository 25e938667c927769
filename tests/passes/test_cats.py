"""Products of a dropped value joined with others: the dropped part is gathered, the others are whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropfx
from tests.promises.both_ways import Body, check_both_ways

Forward = Callable[[Any, Tensor], Any]


def wide(m: Any, *parts: Tensor) -> Tensor:
    """A Linear of as many units as the parts have."""
    x = torch.cat(parts, -1)
    return F.linear(x, m.b.weight.repeat(1, 4)[:8, : x.size(-1)], m.c.bias)


BOTH_SKIP: dict[str, Forward] = {
    "last": lambda m, x: m.wide(torch.cat([x[..., :16], m.d(m.a(x))], -1)),
    "first": lambda m, x: m.wide(torch.cat([m.d(m.a(x)), x[..., :16]], dim=-1)),
    "relu_between": lambda m, x: m.wide(torch.cat([F.relu(m.d(m.a(x))), x[..., :16]], dim=x.dim() - 1)),
    "two_parameters": lambda m, x: m.wide(torch.cat([m.a.bias[:8].expand(6, 5, 8), m.d(m.a(x)), x[..., :8]], -1)),
    "keywords": lambda m, x: m.wide(torch.cat(tensors=(m.d(m.a(x)), x[..., :16]), dim=-1)),
    "between": lambda m, x: m.wide(torch.concat([x[..., :8], m.d(m.a(x)), x[..., 8:16]], -1)),
    "two_before": lambda m, x: m.wide(torch.cat([x[..., :8], x[..., 8:16], m.d(m.a(x))], -1)),
    "read_elsewhere": lambda m, x: (lambda h: m.wide(h).sum() + h.sigmoid().sum())(
        torch.cat([m.d(m.a(x)), x[..., :16]], -1)
    ),
    "reused": lambda m, x: (
        m.wide(torch.cat([m.d(m.a(x)), x[..., :16]], -1)).sum() + m.wide(torch.cat([m.e(m.a(x)), x[..., :16]], -1))
    ),
    "two_draws": lambda m, x: wide(m, m.d(m.a(x)), m.e(m.b(m.a(x)))),
    "same_draw_twice": lambda m, x: (lambda h: wide(m, h, x, h.tanh()))(m.d(m.a(x))),
    "product": lambda m, x: torch.cat([m.d(m.a(x)), x[..., :16]], -1) @ m.wide.weight.t(),
    "before_another_site": lambda m, x: m.c(
        m.e(F.linear(torch.cat([m.d(m.a(x)), x], -1), m.b.weight.repeat(1, 2)[:, :96]))
    ),
}
OPTIONS = [{}, {"groups": 2}, {"pattern": "slice"}, {"pattern": "row"}, {"block": 7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", BOTH_SKIP)
def test_exact(name: str, options: dict[str, Any]) -> None:
    sites = {"d", "e"} if name in ("reused", "two_draws", "before_another_site") else {"d"}
    shape = (6, 32) if name == "product" else (6, 5, 32)
    check_both_ways(BOTH_SKIP[name], torch.randn(shape, dtype=torch.float64), rewritten=sites, **options)


@pytest.mark.parametrize("name", ["last", "first", "relu_between"])
def test_products_on_both_sides_skip_work(name: str) -> None:
    report = dropfx.explain(Body(BOTH_SKIP[name]), torch.randn(6, 5, 32), options={"min_speedup": 0, "groups": 1})
    (site,) = report.sites
    rest = 2 * 30 * 8 * 16 * 2  # of the columns of the others, which ask for no gradient of their own
    assert report.flops_dense - site.flops_dense == rest


def test_one_product_where_nothing_is_gained() -> None:
    """A dropout that runs as written: the graph has the model's own product again."""
    seen = []

    def inner(module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append([node.target for node in module.graph.nodes])
        return module.forward

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.d, self.e, self.c = nn.Linear(32, 64), nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(80, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.d(F.linear(x, self.a.weight))
            return self.c(torch.cat([h[:, :8].sigmoid(), h[:, 8:].exp(), x[:, :16]], -1))

    model, x = Model(), torch.randn(6, 32)
    report = dropfx.explain(model, x, options={"min_speedup": 0, "groups": 1})
    assert [site.rewritten for site in report.sites] == [True]
    dropfx.testing.assert_equivalent(model, x, options={"min_speedup": 0, "groups": 1})
    report = dropfx.explain(model, x, options={"min_speedup": 1000})
    assert [site.rewritten for site in report.sites] == [False]
    dropfx.testing.assert_equivalent(model, x, options={"min_speedup": 1000})


def test_steps_of_a_loop_share_the_gathered_columns() -> None:
    """A decoder that reads its dropped input next to a context at each step."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.d(m.a(x))
        return torch.stack([m.wide(torch.cat([h[:, step], x[:, step, :16]], -1)) for step in range(5)])

    check_both_ways(forward, rewritten={"d"})


def test_tiles_are_of_the_whole_weight() -> None:
    model = dropfx.compile(Body(BOTH_SKIP["first"]), pattern="tile", min_speedup=0)
    with dropfx.testing.record() as masks:
        model(torch.randn(6, 32))
    assert {name: tuple(mask.shape) for name, mask in masks[0].items()} in ({}, {"d": (8, 80)})


def test_input_of_a_cell() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.d, self.cell = nn.Linear(32, 64), nn.Dropout(0.5), nn.LSTMCell(80, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = c = x.new_zeros(x.size(0), 16)
            for step in range(3):
                h, c = self.cell(torch.cat([self.d(self.a(x[:, step])), h], -1), (h, c))
            return h

    model, x = Cell().double(), torch.randn(6, 3, 32, dtype=torch.float64)
    dropfx.testing.assert_equivalent(model, x, options={"min_speedup": 0, "groups": 1})
    report = dropfx.explain(model, x, options={"min_speedup": 0, "groups": 1})
    assert all(site.rewritten for site in report.sites)


def test_input_of_a_recurrent_layer_stays_one_product() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.d, self.layers = nn.Linear(32, 64), nn.Dropout(0.5), nn.GRU(80, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(torch.cat([self.d(self.a(x)), x[..., :16]], -1))[0]

    model, x = Layers().double(), torch.randn(6, 3, 32, dtype=torch.float64)
    dropfx.testing.assert_equivalent(model, x, options={"min_speedup": 0, "groups": 1})
