"""rewrite_convolution: planned convolutions read and make their kept channels; all others stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dropfx
from dropfx import ops
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.nodes import op_name
from dropfx.graph.pass_infra import Context, run_passes
from dropfx.options import make_options
from dropfx.passes.canonicalize import canonicalize
from dropfx.passes.find_sites import find_sites
from dropfx.passes.functionalize import functionalize
from dropfx.passes.insert_draws import insert_draws
from dropfx.passes.plan_regions import plan_regions
from dropfx.passes.rewrite_convolution import rewrite_convolution
from dropfx.passes.rewrite_sites import rewrite_sites
from dropfx.passes.rewrite_views import rewrite_views
from tests.capture import symbolic
from tests.catalogue.case import check_step
from tests.promises.both_ways import compiled_both_ways

PASSES = (functionalize, canonicalize, find_sites, plan_regions, insert_draws, rewrite_sites, rewrite_views)


class Net(nn.Module):
    """Convolutions 4 -> 32 -> 32 -> 8 and a dropout of channels, whose forward is given."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 8, 3)
        self.own = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.d, self.e, self.body = nn.Dropout2d(0.5), nn.Dropout2d(0.25), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def chain(m: Any, x: Tensor) -> Tensor:
    return m.down(m.d(m.up(x).relu()))


def rewritten(body: Callable[[Any, Tensor], Tensor], *more: Any, **options: Any) -> tuple[fx.Graph, Context]:
    context = Context(make_options(min_speedup=0, **options), DEVICES["cpu"])
    net, x = Net(body), torch.randn(4, 4, 8, 8)
    return run_passes(net, symbolic(net, (x,)), [*PASSES, rewrite_convolution, *more], context), context


def convolutions(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if op_name(node) == "conv2d"]


def gathered(node: Any) -> list[int]:
    """The axes along which an argument is gathered, the last one first."""
    axes = []
    while isinstance(node, fx.Node) and node.target is ops.gather_op:
        axes.append(node.args[3])
        node = node.args[0]
    return axes  # type: ignore[return-value]


def test_gathers_rows_before_the_site_and_columns_behind_it() -> None:
    graph, _ = rewritten(chain, groups=1)
    up, down = convolutions(graph)
    assert [gathered(argument) for argument in up.args[:3]] == [[], [-4], [-1]]
    assert [gathered(argument) for argument in down.args[:3]] == [[], [-3], []]


def test_is_made_once_a_draw() -> None:
    graph, _ = rewritten(chain, groups=2)
    assert len(convolutions(graph)) == 4
    assert [node.args[1] for node in graph.find_nodes(op="call_function", target=torch.tensor_split)] == [2, 2]


def test_a_second_run_changes_nothing() -> None:
    once, _ = rewritten(chain)
    twice, _ = rewritten(chain, rewrite_convolution)
    assert str(once) == str(twice)


def test_a_depthwise_one_has_as_many_groups_as_kept_channels() -> None:
    graph, context = rewritten(lambda m, x: m.down(m.own(m.d(m.up(x)))), groups=1)
    _, own, _ = convolutions(graph)
    assert argument_groups(own) is context.draws[0]["width"]
    assert gathered(own.args[1]) == [-4]


def argument_groups(node: fx.Node) -> Any:
    return node.args[6] if len(node.args) > 6 else node.kwargs["groups"]


UNTOUCHED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no_site": lambda m, x: m.down(m.up(x)),
    "written_to": lambda m, x: m.down(m.d(m.up(x)).add_(1.0)),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_leaves_the_others_alone(name: str) -> None:
    graph, _ = rewritten(UNTOUCHED[name])
    last = convolutions(graph)[-1]
    assert gathered(last.args[1]) == []


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def over_positions(x: Tensor) -> Tensor:
    """A view that PyTorch accepts where the channels lie last."""
    return x.permute(0, 2, 3, 1).view(-1)


BODIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "chain": chain,
    "by_keyword": lambda m, x: F.conv2d(input=m.d(m.up(x)), weight=m.down.weight, padding="same", bias=m.down.bias),
    "depthwise": lambda m, x: m.down(m.own(m.d(m.up(x).relu()))),
    "depthwise_by_keyword": lambda m, x: m.down(F.conv2d(m.d(m.up(x)), weight=m.own.weight, groups=32)),
    "two_sites": lambda m, x: m.down(m.e(F.conv2d(m.d(m.up(x)), m.own.weight.expand(-1, 32, -1, -1)))),
    "padded": lambda m, x: m.down(F.pad(m.d(F.interpolate(m.up(x), scale_factor=2)), (1, 0, 2, 1))),
    "padded_with_ones": lambda m, x: m.down(F.pad(m.d(m.up(x)), (1, 1, 1, 1), value=1.0)),
    "channels_last": lambda m, x: m.down(m.d(m.up(last(x)))).permute(0, 2, 3, 1).view(-1),
    "view_of_its_layout": lambda m, x: over_positions((h := m.d(m.up(last(x)))).sigmoid()) + m.down(h).sum(),
    "read_dense_too": lambda m, x: m.down(h := m.d(m.up(x))).sum() + h.amax(1),
}


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"groups": 3, "pattern": "slice"}, {"block": 5}], ids=str)
@pytest.mark.parametrize("name", BODIES)
def test_masked_model(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net(BODIES[name]).double()
    for compiled in compiled_both_ways(model, **options):
        for batch in (4, 5, 1):
            x = torch.randn(batch, 4, 8, 8, dtype=torch.float64)
            masks = check_step(model, compiled, (x,), dtype=torch.float64, seed=batch)
            assert "d" in masks
            assert compiled(x).stride() == model(x).stride()


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("groups", [1, 2])
def test_under_other_compilers(inner: str, groups: int) -> None:
    torch.manual_seed(0)
    model, x = Net(BODIES["two_sites"]), torch.randn(4, 4, 8, 8)
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="dropfx", options={"inner": inner, "min_speedup": 0, "groups": groups})
    assert set(check_step(model, compiled, (x,), dtype=torch.float32, seed=0)) == {"d", "e"}


def test_sites_of_other_groups_do_not_share_a_convolution() -> None:
    """Of 300 samples a dropout of elements needs more draws than one of channels."""
    model = nn.Sequential(
        nn.Conv2d(4, 32, 1), nn.Dropout(0.5), nn.Conv2d(32, 32, 1), nn.Dropout2d(0.5), nn.Conv2d(32, 8, 1)
    ).double()
    x = torch.randn(300, 4, 2, 2, dtype=torch.float64)
    report = dropfx.explain(model, x, options={"min_speedup": 0})
    assert [site.rewritten for site in report.sites] == [True, True]
    assert report.sites[0].draws > report.sites[1].draws > 1
    dropfx.testing.assert_equivalent(model, x, options={"min_speedup": 0})


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 32, 3, groups=2), "before it: conv2d of 2 groups"),
        (nn.ConvTranspose2d(4, 32, 3), "before it: conv_transpose2d"),
    ],
    ids=["grouped", "transposed"],
)
def test_reasons(layer: nn.Module, reason: str) -> None:
    report = dropfx.explain(nn.Sequential(layer, nn.Dropout2d(0.5)), torch.randn(4, 4, 8, 8))
    assert reason in report.sites[0].reason


def test_an_image_without_a_batch_runs_as_written() -> None:
    model = nn.Sequential(nn.Conv2d(4, 32, 3), nn.Dropout2d(0.5), nn.Conv2d(32, 8, 3))
    with pytest.warns(UserWarning, match="3D input to dropout2d"):
        (site,) = dropfx.explain(model, torch.randn(4, 8, 8), options={"min_speedup": 0}).sites
    assert not site.rewritten


def test_small_ones_run_as_written_at_default_options() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Dropout2d(0.2), nn.Conv2d(32, 32, 3))
    (site,) = dropfx.explain(model, torch.randn(8, 16, 16, 16)).sites
    assert "below min_speedup" in site.reason or "costs more than it saves" in site.reason


def test_large_ones_are_rewritten_at_default_options() -> None:
    model = nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(256, 256, 3, padding=1))
    (site,) = dropfx.explain(model, torch.randn(16, 256, 32, 32)).sites
    assert site.predicted_speedup > 1.6
