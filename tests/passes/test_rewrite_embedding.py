"""rewrite_embedding: planned Embeddings read their kept columns; all others stay as they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dropfx import ops
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.notes import Form, UnitAxis
from dropfx.graph.pass_infra import Context, run_passes
from dropfx.options import make_options
from dropfx.passes.canonicalize import canonicalize
from dropfx.passes.find_sites import find_sites
from dropfx.passes.functionalize import functionalize
from dropfx.passes.insert_draws import insert_draws
from dropfx.passes.plan_regions import plan_regions
from dropfx.passes.rewrite_embedding import rewrite_embedding
from dropfx.passes.rewrite_sites import rewrite_sites
from tests.capture import symbolic

PLANNED = (functionalize, canonicalize, find_sites, plan_regions, insert_draws, rewrite_sites)
IDS = torch.tensor([[0, 3, 6], [3, 3, 1]])


class Net(nn.Module):
    """Seven words of 64 features and a Linear, whose forward is given."""

    def __init__(self, body: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.others, self.head = nn.Embedding(7, 64), nn.Embedding(7, 64), nn.Linear(64, 8)
        self.body = body

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self, ids)


def planned(body: Callable[[Net, Tensor], Tensor], *passes: Callable) -> tuple[fx.Graph, Context]:
    context = Context(make_options(min_speedup=0), DEVICES["cpu"])
    net = Net(body)
    return run_passes(net, symbolic(net, (IDS,)), [*PLANNED, *passes], context), context


def by_hand(*rest: object, plan: bool = True, **kwargs: object) -> tuple[fx.GraphModule, Context]:
    """graph(ids, weight, starts, run) -> embedding(ids, weight, *rest), planned to be compact by the draw of site 0."""
    graph, weight = fx.Graph(), torch.randn(7, 64)
    ids, matrix, starts, run = (graph.placeholder(name) for name in ("ids", "weight", "starts", "run"))
    ids.meta["val"], matrix.meta["val"] = IDS, weight
    node = graph.call_function(F.embedding, (ids, matrix, *rest), kwargs)
    node.meta["val"] = F.embedding(IDS, weight)
    if plan:
        node.meta["form"] = Form(0, UnitAxis(-1))
    graph.output(node)
    context = Context(make_options(), DEVICES["cpu"], draws={0: {"starts": starts, "run": run}})
    return fx.GraphModule({}, graph), context


def called(graph: fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def the_gathered(graph: fx.Graph) -> fx.Node:
    (node,) = [node for node in graph.nodes if node.target is ops.embedding_op]
    return node


# -- what it writes -------------------------------------------------------------------------------------------------


def test_planned_embedding_reads_its_kept_columns() -> None:
    module, context = by_hand()
    ids, weight, starts, run = list(module.graph.nodes)[:4]
    assert rewrite_embedding(module, context) == (module, True)
    assert called(module.graph) == [ops.embedding_op]
    assert the_gathered(module.graph).args[:5] == (ids, weight, starts, run, -1)


@pytest.mark.parametrize(("padding", "expected"), [(None, -1), (0, 0), (2, 2), (-1, 6), (-7, 0)])
def test_padding_counts_from_the_front_and_none_is_minus_one(padding: int | None, expected: int) -> None:
    for module, context in (by_hand(padding), by_hand(padding_idx=padding)):
        rewrite_embedding(module, context)
        assert the_gathered(module.graph).args[4] == expected


def test_arguments_may_be_given_by_name() -> None:
    module, context = by_hand()
    ids, weight, starts, run, node = list(module.graph.nodes)[:5]
    node.args, node.kwargs = (), {"input": ids, "weight": weight, "padding_idx": 1}
    rewrite_embedding(module, context)
    assert the_gathered(module.graph).args[:5] == (ids, weight, starts, run, 1)


def test_meta_keeps_the_dense_value_and_the_form() -> None:
    module, context = by_hand()
    before = dict(list(module.graph.nodes)[4].meta)
    rewrite_embedding(module, context)
    meta = the_gathered(module.graph).meta
    assert meta.keys() == before.keys()
    assert all(meta[key] is before[key] for key in before)
    assert meta["val"].shape == (2, 3, 64)


def test_readers_read_the_gathered_value() -> None:
    module, context = by_hand()
    rewrite_embedding(module, context)
    (output,) = module.graph.find_nodes(op="output")
    assert output.args == (the_gathered(module.graph),)


def test_rewritten_graph_gives_the_kept_columns() -> None:
    module, context = by_hand()
    rewrite_embedding(module, context)
    module.recompile()
    weight = torch.randn(7, 64)
    kept = torch.cat([torch.arange(8, 16), torch.arange(48, 56)])
    assert torch.equal(module(IDS, weight, torch.tensor([8, 48]), 8), F.embedding(IDS, weight)[..., kept])


def test_second_run_changes_nothing() -> None:
    module, context = by_hand()
    rewrite_embedding(module, context)
    before = list(module.graph.nodes)
    assert rewrite_embedding(module, context) == (module, False)
    assert list(module.graph.nodes) == before


def test_embedding_without_a_plan_stays() -> None:
    module, context = by_hand(plan=False)
    assert rewrite_embedding(module, context) == (module, False)
    assert called(module.graph) == [F.embedding]


# -- what is planned for it -----------------------------------------------------------------------------------------


def plain(m: Net, ids: Tensor) -> Tensor:
    return m.head(F.dropout(m.words(ids)))


def test_embedding_before_a_dropout_is_rewritten() -> None:
    graph, context = planned(plain, rewrite_embedding)
    (site,) = context.sites
    assert site.rewritten, site.reason
    assert F.embedding not in called(graph)
    draw = context.draws[0]
    assert the_gathered(graph).args[2:5] == (draw["starts"], draw["run"], -1)


def test_producer_before_unitwise_operations_is_rewritten() -> None:
    graph, _ = planned(lambda m, ids: m.head(F.dropout(torch.tanh(m.words(ids) * 8.0))), rewrite_embedding)
    assert F.embedding not in called(graph)


def test_both_tables_of_a_sum_are_rewritten() -> None:
    graph, _ = planned(lambda m, ids: m.head(F.dropout(m.words(ids) + m.others(ids))), rewrite_embedding)
    assert called(graph).count(ops.embedding_op) == 2


def test_table_of_another_branch_stays() -> None:
    graph, _ = planned(lambda m, ids: plain(m, ids) + m.head(m.others(ids)), rewrite_embedding)
    assert called(graph).count(F.embedding) == 1
    assert called(graph).count(ops.embedding_op) == 1


def test_one_table_looked_up_twice_is_rewritten_where_it_is_dropped() -> None:
    graph, _ = planned(lambda m, ids: plain(m, ids) + m.head(m.words(ids)), rewrite_embedding)
    assert called(graph).count(F.embedding) == 1
    assert called(graph).count(ops.embedding_op) == 1


UNSERVED = {
    "max_norm": {"max_norm": 1.0},  # renormalises whole rows, in place
    "sparse": {"sparse": True},  # its gradient is not a dense matrix
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
}


@pytest.mark.parametrize("option", UNSERVED)
def test_options_that_the_op_does_not_serve_keep_the_embedding(option: str) -> None:
    # of a copy: max_norm writes into the matrix
    def lookup(**options: object) -> Callable[[Net, Tensor], Tensor]:
        return lambda m, ids: m.head(F.dropout(F.embedding(ids, m.words.weight.clone(), **options)))

    kept, _ = planned(lookup(**UNSERVED[option]), rewrite_embedding)
    assert F.embedding in called(kept)
    assert ops.embedding_op not in called(kept)
    assert ops.embedding_op in called(planned(lookup(), rewrite_embedding)[0])


@pytest.mark.parametrize(
    ("rest", "rewritten"),
    [
        ((None, None, 2.0, False, False), True),
        ((None, 1.0, 2.0, False, False), False),
        ((None, None, 2.0, True, False), False),
        ((None, None, 2.0, False, True), False),
    ],
)
def test_options_given_by_position_count_as_well(rest: tuple[object, ...], rewritten: bool) -> None:
    """By hand: a trace of F.embedding names them."""
    module, _ = by_hand(*rest, plan=False)
    graph, context = module.graph, Context(make_options(min_speedup=0), DEVICES["cpu"])
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        dropout = graph.call_function(F.dropout, (output.args[0], 0.5, True))
    dropout.meta["val"] = output.args[0].meta["val"]
    output.args = (dropout,)
    passes = (find_sites, plan_regions, insert_draws, rewrite_sites, rewrite_embedding)
    assert (ops.embedding_op in called(run_passes({}, graph, passes, context))) == rewritten


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_module_options_count_as_well(option: str) -> None:
    net = Net(plain)
    net.words = nn.Embedding(7, 64, **UNSERVED[option])
    context = Context(make_options(min_speedup=0), DEVICES["cpu"])
    graph = run_passes(net, symbolic(net, (IDS,)), [*PLANNED, rewrite_embedding], context)
    assert ops.embedding_op not in called(graph)


def test_dense_reader_of_the_looked_up_rows_keeps_them_dense() -> None:
    def body(m: Net, ids: Tensor) -> Tensor:
        rows = m.words(ids)
        return m.head(F.dropout(rows)).sum() + rows.sum()

    assert ops.embedding_op not in called(planned(body, rewrite_embedding)[0])


def test_axis_other_than_the_features_keeps_the_embedding() -> None:
    """The dropped units are the words' positions, of which each needs a whole row."""

    def body(m: Net, ids: Tensor) -> Tensor:
        return F.dropout(m.words(ids).transpose(1, 2)).sum()

    assert ops.embedding_op not in called(planned(body, rewrite_embedding)[0])
