"""expand_recurrent on graphs built by hand: what it writes, what stays whole, names of the sites, twice is once."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dropfx import ops
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.dropout_ops import RECURRENT_FUNCTIONS, Call
from dropfx.graph.notes import Dropping
from dropfx.graph.pass_infra import Context
from dropfx.options import make_options
from dropfx.passes.expand_recurrent import expand_recurrent

STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}
FUNCTIONS = {kind: function for function, kind in RECURRENT_FUNCTIONS.items()}


def by_hand(
    kind: str = "lstm",
    *,
    layers: int = 2,
    dropout: float = 0.5,
    train: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj: int = 0,
    meta: dict[str, Any] | None = None,
) -> tuple[fx.GraphModule, nn.RNNBase, list[torch.Tensor]]:
    """graph(x, states, weights) -> output and last states of all layers; the module that has these weights."""
    cls: Any = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.RNN)
    given = {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {"proj_size": proj} if proj else {}
    given |= {"bidirectional": bidirectional, "batch_first": batch_first}
    layer = cls(4, 6, layers, dropout=dropout if layers > 1 else 0.0, **given).double().train(train)
    widths = [proj or 6, 6][: STATES[kind]]
    places = layers * (2 if bidirectional else 1)
    values = [torch.randn(5, 3, 4).double(), *(torch.randn(places, 3, width).double() for width in widths)]
    if batch_first:
        values[0] = values[0].transpose(0, 1).contiguous()
    values += [weight.detach() for weight in layer._flat_weights]
    graph, mode = fx.Graph(), FakeTensorMode()
    nodes = [graph.placeholder(f"value_{index}") for index in range(len(values))]
    for node, value in zip(nodes, values, strict=True):
        node.meta["val"] = mode.from_tensor(value)
    states, weights = nodes[1 : 1 + len(widths)], nodes[1 + len(widths) :]
    hx = tuple(states) if kind == "lstm" else states[0]
    rest = (True, layers, dropout, train, bidirectional, batch_first)
    made = graph.call_function(FUNCTIONS[kind], (nodes[0], hx, weights, *rest))
    made.meta |= meta or {}
    graph.output(tuple(graph.call_function(operator.getitem, (made, index)) for index in range(1 + len(states))))
    return fx.GraphModule({}, graph), layer, values


def run(module: fx.GraphModule, eager: bool = True) -> bool:
    return expand_recurrent(module, Context(make_options(), DEVICES["cpu"], eager=eager)).modified


def calls(module: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is target]


def theirs(layer: nn.RNNBase, values: list[torch.Tensor]) -> list[torch.Tensor]:
    states = values[1 : 1 + (2 if isinstance(layer, nn.LSTM) else 1)]
    out, last = layer(values[0], tuple(states) if len(states) > 1 else states[0])
    return [out, *(last if len(states) > 1 else [last])]


# -- what it writes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_fires_and_computes_the_same(kind: str, bidirectional: bool, batch_first: bool) -> None:
    module, layer, values = by_hand(kind, dropout=0.0, bidirectional=bidirectional, batch_first=batch_first)
    assert run(module)
    assert not calls(module, FUNCTIONS[kind])
    count = 4 if bidirectional else 2
    assert len(calls(module, F.linear)) == len(calls(module, ops.recurrence_op)) == count
    module.recompile()
    torch.testing.assert_close(list(module(*values)), theirs(layer, values))
    assert not run(module), "a second run finds nothing"


def test_projection() -> None:
    module, layer, values = by_hand(proj=2, dropout=0.0, bidirectional=True)
    assert run(module)
    module.recompile()
    torch.testing.assert_close(list(module(*values)), theirs(layer, values))


def test_biases_are_added_but_those_of_a_gru() -> None:
    for kind, joined in (("lstm", True), ("rnn_tanh", True), ("gru", False)):
        module, _, _ = by_hand(kind, layers=1)
        run(module)
        (linear,), (recurrence,) = calls(module, F.linear), calls(module, ops.recurrence_op)
        assert (linear.args[2].target is torch.add) == joined
        assert (recurrence.args[5] is None) == joined


def test_values_keep_their_fakes() -> None:
    module, _, _ = by_hand(bidirectional=True, batch_first=True)
    run(module)
    (output,) = module.graph.find_nodes(op="output")
    assert [tuple(node.meta["val"].shape) for node in output.args[0]] == [(3, 5, 12), (4, 3, 6), (4, 3, 6)]


def test_a_site_in_each_gap() -> None:
    meta = {"recurrent": Dropping(Call("net.rnn"), 0.25, 3)}
    module, _, _ = by_hand(layers=3, meta=meta)
    run(module)
    sites = [node.meta["site"] for node in calls(module, F.dropout)]
    assert [site.call.name for site in sites] == ["net.rnn.dropout[0]", "net.rnn.dropout[1]"]
    assert all(site.rate == 0.25 and site.live == 3 for site in sites)


@pytest.mark.parametrize(
    ("path", "count", "name"),
    [("", 1, "dropout[0]"), ("rnn", 2, "rnn.dropout[0]#2"), ("", 3, "dropout[0]#3")],
)
def test_names(path: str, count: int, name: str) -> None:
    module, _, _ = by_hand(meta={"recurrent": Dropping(Call(path, count), 0.25)})
    run(module)
    (site,) = calls(module, F.dropout)
    assert site.meta["site"].call.name == name


@pytest.mark.parametrize("given", [{"dropout": 0.0}, {"layers": 1}], ids=str)
def test_no_site_where_nothing_drops(given: dict[str, Any]) -> None:
    module, _, _ = by_hand(**given)
    assert run(module)
    assert not calls(module, F.dropout)


# -- what stays whole -----------------------------------------------------------------------------------------------


def test_one_that_does_not_train_stays_whole() -> None:
    module, _, _ = by_hand(train=False)
    assert not run(module)
    assert len(calls(module, torch.lstm)) == 1


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_further_compilers_get_it_as_one_op(kind: str) -> None:
    module, layer, values = by_hand(kind, train=False)
    assert run(module, eager=False)
    assert len(calls(module, ops.recurrent_as_written_op)) == 1
    module.recompile()
    assert all(torch.equal(*pair) for pair in zip(module(*values), theirs(layer, values), strict=True))


def test_the_op_is_told_the_grad_mode_of_its_place() -> None:
    module, _, _ = by_hand(train=False)
    (function,) = calls(module, torch.lstm)
    with module.graph.inserting_before(function):
        module.graph.call_function(torch._C._set_grad_enabled, (False,))
    run(module, eager=False)
    (op,) = calls(module, ops.recurrent_as_written_op)
    assert op.args[-1] is False


def test_result_read_whole_stays_whole() -> None:
    module, _, _ = by_hand()
    (function,) = calls(module, torch.lstm)
    (output,) = module.graph.find_nodes(op="output")
    output.args = ((*output.args[0], function),)
    assert not run(module)


def test_operand_without_a_value_stays_whole() -> None:
    module, _, _ = by_hand()
    next(iter(module.graph.nodes)).meta["val"] = None
    assert not run(module)


def test_weights_of_another_number_stay_an_error() -> None:
    """PyTorch refuses them; layer by layer they might fit by chance."""
    module, _, values = by_hand()
    (function,) = calls(module, torch.lstm)
    function.args = (*function.args[:3], False, *function.args[4:])  # no biases
    assert not run(module)
    module.recompile()
    with pytest.raises(RuntimeError, match="weights"):
        module(*values)
