"""Passes on graphs built by hand: what fires, what does not, and that a second run changes nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dropfx import ops
from dropfx.errors import PassError
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.nodes import op_name
from dropfx.graph.pass_infra import Context, PassResult, run_passes
from dropfx.options import make_options
from dropfx.passes import PIPELINE
from dropfx.passes.canonicalize import canonicalize
from dropfx.passes.find_sites import find_sites
from dropfx.passes.fold_scale import fold_scale
from dropfx.passes.functionalize import functionalize
from dropfx.passes.insert_draws import insert_draws
from dropfx.passes.plan_regions import plan_regions
from dropfx.passes.plan_tiles import plan_tiles
from dropfx.passes.rewrite_linear import rewrite_linear
from dropfx.passes.rewrite_residual import rewrite_residual
from dropfx.passes.rewrite_sites import rewrite_sites
from dropfx.passes.rewrite_tiles import rewrite_tiles
from dropfx.passes.rewrite_views import rewrite_views
from tests.capture import symbolic


class Body(nn.Module):
    """A 64-128-32 perceptron whose forward is given."""

    def __init__(self, forward: Callable[["Body", Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 32)
        self.norm, self.vector, self.body = nn.LayerNorm(128), nn.Parameter(torch.ones(128)), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def plain(m: Body, x: Tensor) -> Tensor:
    return m.second(F.dropout(F.relu(m.first(x))))


def run(forward: Callable[[Body, Tensor], Tensor], *passes: Callable, **options: object) -> tuple[fx.Graph, Context]:
    context = Context(make_options(**{"min_speedup": 0, **options}), DEVICES["cpu"])
    model = Body(forward)
    graph = symbolic(model, (torch.randn(8, 64),))
    return run_passes(model, graph, passes, context), context


def targets(graph: fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.op in ("call_function", "call_method")]


PLANNED = (functionalize, canonicalize, find_sites, plan_regions, insert_draws, rewrite_sites)


def test_functionalize_redirects_later_reads_of_value_and_views() -> None:
    def forward(m: Body, x: Tensor) -> Tensor:
        h = m.first(x)
        view = h.view(8, 2, 64)
        h.relu_()
        return h.sum() + view.sum()

    graph, _ = run(forward, functionalize)
    assert "relu_" not in targets(graph)
    (relu,) = [n for n in graph.nodes if n.target == "relu"]
    assert {user.target for user in relu.users} == {"view", "sum"}
    assert targets(graph) == targets(run(forward, functionalize, functionalize)[0])


def test_functionalize_leaves_writes_into_inputs() -> None:
    graph, _ = run(lambda m, x: m.first(x.mul_(2)), functionalize)
    assert "mul_" in targets(graph)
    assert all("pinned" in n.meta for n in graph.nodes if n.op == "placeholder")


def test_canonicalize_drops_what_is_off_and_asks_sizes_at_the_source() -> None:
    def forward(m: Body, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(m.first(x)), 0.5, False)
        return h.reshape(h.size(0), -1)

    graph, _ = run(forward, canonicalize)
    assert F.dropout not in targets(graph)
    (size,) = [n for n in graph.nodes if n.target == "size"]
    assert size.args[0].op == "placeholder"


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: F.dropout(m.norm(m.first(x)).mean(1)), "no Linear"),
        (lambda m, x: m.second(F.dropout(m.first(x), 0.0)), "rate is 0"),
        (lambda m, x: m.second(F.dropout(m.first(x), 1.0)), "rate is 1"),
        (lambda m, x: F.linear(x, F.dropout(m.first.weight)), "drops a weight"),
        (lambda m, x: F.batch_norm(F.dropout(m.first(x)), None, None, training=True), "statistics of a batch"),
        (lambda m, x: F.linear(F.dropout(m.first(x)).t(), m.second.weight[:, :8]), "another axis"),
    ],
)
def test_refusals_carry_their_reason(forward: Callable[[Body, Tensor], Tensor], reason: str) -> None:
    _, context = run(forward, find_sites, plan_regions)
    assert [site.rewritten for site in context.sites] == [False]
    assert reason in context.sites[0].reason


def forms(graph: fx.Graph) -> set[str]:
    return {n.name for n in graph.nodes if "form" in n.meta}


@pytest.mark.parametrize(
    ("forward", "compact"),
    [
        (plain, {"linear", "relu", "dropout"}),
        (lambda m, x: m.second(F.sigmoid(F.dropout(F.relu(m.first(x))))), {"linear", "relu", "dropout"}),
        (lambda m, x: m.second(F.gelu(F.dropout(m.first(x)))), {"linear", "dropout", "gelu"}),
        (lambda m, x: m.second(F.dropout(m.norm(m.first(x)))), {"dropout"}),
        (lambda m, x: m.second(F.dropout(m.first(x)) * m.vector), {"linear", "dropout", "mul"}),
        (lambda m, x: m.second(F.dropout(m.first(x) + m.vector)), {"linear", "add", "dropout"}),
    ],
)
def test_plan_stops_where_zeros_are_lost(forward: Callable[[Body, Tensor], Tensor], compact: set[str]) -> None:
    graph, context = run(forward, find_sites, plan_regions)
    assert [s.rewritten for s in context.sites] == [True]
    assert forms(graph) == compact


def test_second_dense_reader_before_the_site_keeps_the_value_dense() -> None:
    def forward(m: Body, x: Tensor) -> Tensor:
        h = F.relu(m.first(x))
        return m.second(F.dropout(h)).sum() + h.sum()

    assert forms(run(forward, find_sites, plan_regions)[0]) == {"dropout"}


def test_rewrites_give_gathered_products_with_the_scale_folded() -> None:
    graph, context = run(plain, *PLANNED, rewrite_views, rewrite_linear, fold_scale)
    first, second = [n for n in graph.nodes if n.target is ops.linear_op]
    draw = context.draws[0]
    assert first.args[3:] == (draw["starts"], draw["run"], None, 0, 1.0, 0, 0)
    assert second.args[3:] == (None, 0, draw["starts"], draw["run"], draw["scale"], 0, 0)


def test_groups_ask_the_leading_length_before_the_first_compact_value() -> None:
    graph, context = run(plain, *PLANNED, rewrite_views, rewrite_linear, fold_scale, groups=2)
    first, second = [n for n in graph.nodes if n.target is ops.linear_op]
    leading = context.draws[0]["leading"]
    assert (leading.target, leading.args[0].op, leading.args[1]) == ("size", "placeholder", 0)
    assert (first.args[8:], second.args[8:]) == ((leading, 0), (0, leading))
    assert graph.output_node().args[0][-1] is leading


def test_vector_without_rows_is_spread_over_them_for_groups() -> None:
    graph, _ = run(lambda m, x: m.second(F.dropout(m.first(x) * m.vector)), *PLANNED, groups=2)
    (spread,) = [n for n in graph.nodes if n.target is ops.spread_rows]
    assert spread.args[0].target == "vector"
    assert [user.target for user in spread.users] == [ops.gather_op]


def test_tiles_take_the_place_of_the_dropout_before_a_linear() -> None:
    steps = (functionalize, canonicalize, find_sites, plan_regions, plan_tiles, insert_draws, rewrite_tiles)
    graph, context = run(plain, *steps, pattern="tile")
    (tiled,) = [n for n in graph.nodes if n.target is ops.tiled_linear_op]
    draw = context.draws[0]
    assert tiled.args[3:] == (32, 32, draw["lattice"], draw["scale"])
    assert op_name(tiled.args[0]) == "relu"
    assert not any(op_name(n) == "dropout" for n in graph.nodes)
    assert targets(graph) == targets(run(plain, *steps, rewrite_tiles, pattern="tile")[0])


def test_tiles_leave_a_dropout_that_others_read_too() -> None:
    def forward(m: Body, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(m.first(x)))
        return m.second(h).sum() + m.norm(h).sum()

    steps = (functionalize, canonicalize, find_sites, plan_regions, plan_tiles, insert_draws, rewrite_tiles)
    graph, context = run(forward, *steps, pattern="tile")
    assert ops.tiled_linear_op not in targets(graph)
    assert "Linears alone" in context.sites[0].reason
    assert ops.scale_units not in targets(graph)
    assert ops.gather_op not in targets(graph)


def test_scale_stays_at_the_site_before_gelu() -> None:
    graph, _ = run(lambda m, x: m.second(F.gelu(F.dropout(m.first(x)))), *PLANNED, rewrite_linear, fold_scale)
    assert ops.scale_units in targets(graph)


def test_view_of_a_compact_value_does_not_name_the_dense_width() -> None:
    graph, context = run(lambda m, x: m.second(F.dropout(m.first(x)).view(2, 4, 128)), *PLANNED, rewrite_views)
    (view,) = [n for n in graph.nodes if n.target == "view"]
    assert view.args[1:] == (2, 4, context.draws[0]["width"])


def test_residual_add_takes_kept_units_alone() -> None:
    graph, _ = run(lambda m, x: m.norm(m.first(x)) + F.dropout(m.first(x)), *PLANNED, rewrite_linear, rewrite_residual)
    assert ops.residual_add_op in targets(graph)
    assert ops.scatter_op not in targets(graph)


def test_below_min_speedup_nothing_is_rewritten() -> None:
    graph, context = run(plain, find_sites, plan_regions, min_speedup=100.0)
    assert not context.sites[0].rewritten
    assert not forms(graph)


def test_pipeline_leaves_a_graph_without_dropout_as_it_is() -> None:
    before = targets(symbolic(Body(lambda m, x: m.second(F.relu(m.first(x)))), (torch.randn(8, 64),)))
    assert targets(run(lambda m, x: m.second(F.relu(m.first(x))), *PIPELINE)[0]) == before


def test_runner_names_the_pass_that_failed() -> None:
    def broken(module: fx.GraphModule, context: Context) -> PassResult:
        raise KeyError("gone")

    with pytest.raises(PassError, match=r"'broken' failed after canonicalize: .*gone"):
        run(plain, canonicalize, broken)
