"""join_recurrent on graphs built by hand: fires, each refusal, twice is once, values alike."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dropfx import ops
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.pass_infra import Context
from dropfx.options import make_options
from dropfx.passes.join_recurrent import join_recurrent

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a CPU's one piece is oneDNN's")

SIZES = {"x": (7, 3, 8), "w_ih": (24, 8), "b_ih": (24,), "b_hh": (24,), "h": (3, 6), "c": (3, 6), "w_hh": (24, 6)}
Product = Callable[[dict[str, fx.Node], fx.Graph], fx.Node]


def dense(n: dict[str, fx.Node], graph: fx.Graph) -> fx.Node:
    return graph.call_function(F.linear, (n["x"], n["w_ih"], graph.call_function(torch.add, (n["b_ih"], n["b_hh"]))))


def no_bias(n: dict[str, fx.Node], graph: fx.Graph) -> fx.Node:
    return graph.call_function(F.linear, (n["x"], n["w_ih"]))


def gathered(n: dict[str, fx.Node], graph: fx.Graph, **given: Any) -> fx.Node:
    """Columns 2, 3, 6, 7 of the weight."""
    compact = graph.call_function(ops.gather_op, (n["x"], n["starts"], 2, -1, 0))
    bias = graph.call_function(torch.add, (n["b_ih"], n["b_hh"]))
    rows = given.get("rows", (None, 0))
    return graph.call_function(
        ops.linear_op, (compact, n["w_ih"], bias, *rows, n["starts"], 2, given.get("scale", 1.0))
    )


def transposed(n: dict[str, fx.Node], graph: fx.Graph) -> fx.Node:
    """The gates of batch-first inputs, whose groups would lie along the batch."""
    first = graph.call_method("transpose", (n["x"], 0, 1))
    first.meta["val"] = torch.empty(3, 7, 8)
    return graph.call_method("transpose", (graph.call_function(F.linear, (first, n["w_ih"])), 0, 1))


def by_hand(
    product: Product, *, dtype: torch.dtype = torch.float32, reverse: bool = False, kind: str = "lstm"
) -> tuple[fx.GraphModule, list[Tensor]]:
    """graph(...) -> recurrence(product, h, c, w_hh), and its inputs."""
    torch.manual_seed(0)
    values = {name: 0.5 * torch.randn(*shape, dtype=dtype) for name, shape in SIZES.items()}
    values["starts"] = torch.tensor([2, 6])
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in values}
    pre = product(nodes, graph)
    pre.meta["val"] = torch.empty(7, 3, 24, dtype=dtype)
    c = nodes["c"] if kind == "lstm" else None
    made = graph.call_function(ops.recurrence_op, (kind, pre, nodes["h"], c, nodes["w_hh"], None, None, None, reverse))
    graph.output(tuple(graph.call_function(operator.getitem, (made, index)) for index in range(3 if c else 2)))
    return fx.GraphModule({}, graph), list(values.values())


def run(module: fx.GraphModule, eager: bool = True) -> bool:
    return join_recurrent(module, Context(make_options(), DEVICES["cpu"], eager=eager)).modified


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("product", [dense, no_bias, gathered, transposed])
def test_fires(product: Product, reverse: bool) -> None:
    module, values = by_hand(product, reverse=reverse)
    expected = module(*values)
    assert run(module)
    module.graph.eliminate_dead_code()
    targets = [node.target for node in module.graph.nodes]
    assert (ops.recompute_gather if product is gathered else torch.lstm) in targets
    assert not {ops.recurrence_op, F.linear, ops.linear_op} & set(targets)
    assert not run(module), "a second run finds nothing"
    module.recompile()
    torch.testing.assert_close(module(*values), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("product", [dense, no_bias, gathered, transposed])
def test_graphs_of_further_compilers_get_an_op(product: Product, reverse: bool) -> None:
    module, values = by_hand(product, reverse=reverse)
    expected = module(*values)
    assert run(module, eager=False)
    module.graph.eliminate_dead_code()
    targets = {node.target for node in module.graph.nodes}
    assert ops.lstm_layer_op in targets
    assert not {ops.recurrence_op, torch.lstm, F.linear, ops.linear_op} & targets
    module.recompile()
    torch.testing.assert_close(module(*values), expected)


def scaled(n: dict[str, fx.Node], graph: fx.Graph) -> fx.Node:
    return gathered(n, graph, scale=2.0)


def rows_gathered(n: dict[str, fx.Node], graph: fx.Graph) -> fx.Node:
    return gathered(n, graph, rows=(n["starts"], 2))


def sum_of_products(n: dict[str, fx.Node], graph: fx.Graph) -> fx.Node:
    return graph.call_function(torch.add, (no_bias(n, graph), no_bias(n, graph)))


def tiled(n: dict[str, fx.Node], graph: fx.Graph) -> fx.Node:
    return graph.call_function(ops.tiled_linear_op, (n["x"], n["w_ih"], None, 4, 4, n["starts"], 1.0))


@pytest.mark.parametrize("product", [scaled, rows_gathered, sum_of_products, tiled])
def test_other_products_are_left(product: Product) -> None:
    assert not run(by_hand(product)[0])


def test_product_with_another_reader_is_left() -> None:
    """Its value is needed as it is."""
    module, _ = by_hand(dense)
    (output,) = module.graph.find_nodes(op="output")
    (linear,) = (node for node in module.graph.nodes if node.target is F.linear)
    output.args = ((*output.args[0], linear),)
    assert not run(module)


@pytest.mark.parametrize("given", [{"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"kind": "rnn_tanh"}], ids=str)
def test_what_onednn_has_not(given: dict[str, Any]) -> None:
    assert not run(by_hand(no_bias, **given)[0])


def test_packed_rows_in_reverse_are_left() -> None:
    module, _ = by_hand(dense, reverse=True)
    (node,) = (node for node in module.graph.nodes if node.target is ops.recurrence_op)
    node.args = (*node.args[:7], next(iter(module.graph.nodes)), True)
    assert not run(module)


@pytest.mark.parametrize("places", [(9, 10), (11, 12)])
def test_kept_recurrent_weight_is_left(places: tuple[int, int]) -> None:
    module, _ = by_hand(dense)
    (node,) = (node for node in module.graph.nodes if node.target is ops.recurrence_op)
    starts = next(n for n in module.graph.nodes if n.name == "starts")
    kept: list[Any] = [None, 0, None, 0]
    kept[places[0] - 9], kept[places[1] - 9] = starts, 2
    node.args = (*node.args, *kept)
    assert not run(module)


def test_projection_is_left() -> None:
    module, _ = by_hand(dense)
    (node,) = (node for node in module.graph.nodes if node.target is ops.recurrence_op)
    node.args = (*node.args[:6], next(iter(module.graph.nodes)), *node.args[7:])
    assert not run(module)
