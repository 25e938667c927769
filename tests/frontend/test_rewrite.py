"""`dropfx.rewrite` on graphs of torch.fx's tracer and of `dropfx.Tracer`."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dropfx
from tests.catalogue.case import mlp, recording
from tests.oracle import comparison, oracle


class Functional(nn.Module):
    """A functional dropout with the module's own flag and rate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.p = nn.Linear(64, 128), nn.Linear(128, 8), 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.dropout(F.relu(self.inner(x)), self.p, self.training))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.before, self.rnn = nn.Dropout(0.5), kind(64, 64, 2, dropout=0.5, **options)
        self.after, self.out = nn.Dropout(0.5), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.after(self.rnn(self.before(x))[0]))


class Spelled(nn.Module):
    """Sizes, writes in place, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(64, 64), nn.Linear(64, 64), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).view(x.size(0), -1)
        return x + self.drop(self.b(h.relu_()))


MODELS: dict[str, tuple[Any, tuple[int, ...], set[str]]] = {
    "mlp": (lambda: mlp(64, 128, 128, 8), (6, 64), {"2", "5"}),
    "functional": (Functional, (6, 64), {":dropout_1"}),
    "lstm": (lambda: Recurrent(nn.LSTM), (5, 3, 64), {"before", "rnn.dropout[0]", "after"}),
    "gru": (lambda: Recurrent(nn.GRU, batch_first=True), (3, 5, 64), {"before", "rnn.dropout[0]", "after"}),
    "spelled": (Spelled, (6, 64), {"drop"}),
}


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, dropfx.Tracer().trace(model))


@pytest.mark.parametrize("by", [traced, fx.symbolic_trace], ids=["Tracer", "symbolic_trace"])
@pytest.mark.parametrize("options", [{}, {"pattern": "slice"}, {"pattern": "row"}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_exact_given_the_draw(name: str, options: dict[str, Any], by: Any) -> None:
    build, shape, sites = MODELS[name]
    original = build().double()
    x = torch.randn(*shape, dtype=torch.float64)
    module = dropfx.rewrite(by(copy.deepcopy(original)), x, options={"min_speedup": 0, **options})
    for batch in (x, torch.cat([x, x], 1 if name == "lstm" else 0)):
        with recording() as masks:
            actual = oracle.run(module, (batch,))
        assert set(masks) == sites
        expected = oracle.oracle_run(original, masks, (batch,))
        actual.grads = {path.replace("_orig.", ""): value for path, value in actual.grads.items()}
        comparison.compare(actual, expected, torch.float64, True)


def test_eval_runs_the_graph_that_was_given() -> None:
    model = mlp(64, 128, 8)
    graph, x = traced(model), torch.randn(6, 64)
    module = dropfx.rewrite(graph, x, options={"min_speedup": 0}).eval()
    assert torch.equal(module(x), model.eval()(x))
    assert not graph.training or graph is not module


def test_tracer_does_not_bake_training_in() -> None:
    graph = traced(Functional())
    x = torch.randn(6, 64)
    assert not torch.equal(graph(x), graph(x))
    graph.eval()
    assert torch.equal(graph(x), graph(x))
    assert any(node.op == "get_attr" and node.target == "training" for node in graph.graph.nodes)


def test_tracer_keeps_dropouts_linears_and_recurrent_layers() -> None:
    graph = dropfx.Tracer().trace(Recurrent(nn.LSTM))
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["before", "rnn", "after", "out"]


def test_tracer_refuses_a_branch_on_training() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x) if self.training else x

    model = Branch()
    with pytest.raises(fx.proxy.TraceError, match=r"branches on training"):
        dropfx.Tracer().trace(model)
    assert model.training is True


def test_graph_is_left_as_it_was() -> None:
    graph = traced(mlp(64, 128, 8)).eval()
    before = graph.code
    dropfx.rewrite(graph, torch.randn(6, 64), options={"min_speedup": 0})
    assert graph.code == before
    assert not any(module.training for module in graph.modules())


def test_dropout_that_is_off_stays_off() -> None:
    model = mlp(64, 128, 8)
    model[2].eval()
    graph = traced(model)
    module = dropfx.rewrite(graph, torch.randn(6, 64), options={"min_speedup": 0})
    with recording() as masks:
        module(torch.randn(6, 64))
    assert "dropfx_draws" in dict(module.named_children()) or not masks


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dropfx.rewrite(nn.Linear(2, 2)), dropfx.InvalidModel, "graph_module: got Linear"),
        (lambda: dropfx.rewrite(traced(mlp(8, 8)), options=3), dropfx.InvalidOption, "options: got int"),
        (lambda: dropfx.rewrite(traced(mlp(8, 8)), options={"patern": "row"}), dropfx.InvalidOption, "pattern"),
        (lambda: dropfx.rewrite(traced(mlp(8, 8)), torch.ones(3, 7)), dropfx.InvalidInput, "example_inputs"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_fresh_draws_that_a_seed_repeats() -> None:
    module = dropfx.rewrite(traced(mlp(64, 128, 8)), torch.randn(6, 64), options={"min_speedup": 0})
    x = torch.randn(6, 64)
    torch.manual_seed(0)
    first, second = module(x), module(x)
    torch.manual_seed(0)
    assert torch.equal(first, module(x))
    assert not torch.equal(first, second)
    assert operator.contains(dict(module.named_children()), "dropfx_draws")
