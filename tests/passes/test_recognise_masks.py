"""recognise_masks on recorded graphs: fires, its arguments, each refusal, twice is once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from dropfx.graph.device_costs import DEVICES
from dropfx.graph.dropout_ops import Call
from dropfx.graph.nodes import op_name
from dropfx.graph.notes import Dropping
from dropfx.graph.pass_infra import Context, run_passes
from dropfx.ops.shared_dropout import shared_dropout
from dropfx.options import make_options
from dropfx.passes import PIPELINE
from dropfx.passes.canonicalize import canonicalize
from dropfx.passes.find_sites import find_sites
from dropfx.passes.functionalize import functionalize
from dropfx.passes.recognise_masks import recognise_masks
from tests.capture import trace
from tests.catalogue import CASES
from tests.catalogue.masks import OTHERS, SEVERAL

PASSES = (functionalize, recognise_masks)


def run(name: str, *passes: Any, **options: Any) -> tuple[fx.Graph, Context]:
    model, (args, kwargs) = CASES[name].make(), CASES[name].call(4)
    context = Context(make_options(**{"min_speedup": 0, **options}), DEVICES["cpu"])
    return run_passes(model, trace(model, args, kwargs), passes, context), context


def sites(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is shared_dropout]


@pytest.mark.parametrize(
    ("name", "rate", "shared"),
    [
        ("rnn_dropout", 0.5, (False, True, False)),
        ("rnn_dropout_newer", 0.5, (False, True, False)),
        ("locked_dropout", 0.5, (True, False, False)),
        ("locked_dropout_torchnlp", 0.25, (True, False, False)),
        ("mask_statements", 0.25, (True, True, False)),
        ("mask_functions", 0.25, (False, True, False)),
        ("mask_in_place", 0.25, (False, False, False)),
        ("mask_probabilities", 0.25, (False, True, False)),
        ("mask_probabilities_by_size", 0.25, (False, True, False)),
    ],
)
def test_fires(name: str, rate: float, shared: tuple[bool, ...]) -> None:
    graph, _ = run(name, *PASSES)
    (site,) = sites(graph)
    assert site.args[1:] == (rate, shared, "probabilities" in name, None)
    assert site.meta["site"] == Dropping(Call("drop:bernoulli"), rate)
    assert not any("bernoulli" in str(node.target) for node in graph.nodes)
    assert "size" not in [user.target for user in site.args[0].users]  # nothing of the mask is left
    assert len(sites(run(name, *PASSES, recognise_masks)[0])) == 1


@pytest.mark.parametrize("body", SEVERAL)
def test_one_mask_of_several_products(body: Any) -> None:
    """It becomes a dropout of ones, which reads nothing else; nothing of the model's own mask is left."""
    graph, _ = run(f"mask_{body.__name__}", *PASSES, canonicalize)
    (site,) = sites(graph)
    ones = site.args[0]
    assert isinstance(ones, fx.Node)
    assert ones.target is torch.ones
    assert {operand.target for operand in ones.all_input_nodes} <= {"size"}
    assert len(site.users) > 1
    assert site.meta["site"] == Dropping(Call("drop:bernoulli"), 0.25)
    left = {"bernoulli", "new_empty", "empty_like", "full", "expand", "expand_as", "detach"}
    assert left.isdisjoint(op_name(node) for node in graph.nodes)
    assert len(sites(run(f"mask_{body.__name__}", *PASSES, recognise_masks)[0])) == 1


@pytest.mark.parametrize("name", [f"no_mask_{body.__name__}" for body in OTHERS])
def test_other_draws_stay(name: str) -> None:
    graph, context = run(name, *PIPELINE)
    assert not sites(graph)
    assert not context.sites
    assert any("bernoulli" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("rnn_dropout", {"groups": 2}, ""),
        ("locked_dropout", {"groups": 2}, "one mask for its whole leading axis"),
        ("mask_statements", {"groups": 2}, "one mask for its whole leading axis"),
        ("rnn_dropout", {"pattern": "tile"}, "replaces calls of dropout"),
        ("locked_dropout", {"pattern": "row"}, ""),
        ("mask_used_twice", {"groups": 2}, ""),
        ("mask_used_in_a_loop", {"groups": 2}, ""),
        ("mask_used_in_a_loop", {"pattern": "tile"}, "replaces calls of dropout"),
    ],
)
def test_reasons(name: str, options: dict[str, Any], reason: str) -> None:
    _, context = run(name, *PASSES, find_sites, **options)
    (site,) = context.sites
    assert reason in site.reason
    assert bool(reason) == bool(site.reason)


def test_as_written_it_is_the_product_with_the_same_random_mask() -> None:
    x = torch.randn(4, 3, 8)
    torch.manual_seed(0)
    expected = x * x.new_empty(4, 1, 8).bernoulli_(0.75).div_(0.75)
    torch.manual_seed(0)
    assert torch.equal(shared_dropout(x, 0.25, (False, True, False)), expected)
    torch.manual_seed(0)
    expected = x * (torch.bernoulli(torch.full((4, 1, 8), 0.75)) / 0.75)
    torch.manual_seed(0)
    assert torch.equal(shared_dropout(x, 0.25, (False, True, False), True), expected)
