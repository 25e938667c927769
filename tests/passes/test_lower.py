"""lower on graphs built by hand: eager graphs get the autograd functions, compilers keep the registered ops."""

import copy
import operator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dropfx import ops
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.pass_infra import Context
from dropfx.options import make_options
from dropfx.passes import PIPELINE
from dropfx.passes.check_result import check_result
from dropfx.passes.fuse_activation import fuse_activation
from dropfx.passes.keep_weights import keep_weights
from dropfx.passes.lower import lower

STARTS = torch.tensor([0, 8])
CALLS = {
    ops.linear_op: (torch.ones(3, 4), torch.ones(16, 4), torch.ones(16), STARTS, 4, None, 0, 1.0),
    ops.embedding_op: (torch.tensor([1, 2]), torch.ones(5, 16), STARTS, 4, -1),
    ops.residual_add_op: (torch.ones(3, 16), torch.ones(3, 8), STARTS, 4, -1, 16, 1.0),
    ops.gather_op: (torch.ones(3, 16), STARTS, 4, -1),
    ops.scatter_op: (torch.ones(3, 8), STARTS, 4, -1, 16),
    ops.tiled_linear_op: (torch.ones(3, 16), torch.ones(8, 16), torch.ones(8), 4, 4, torch.tensor([2, 1]), 1.5),
}
"""Each gathered op with arguments that fit; the tensors become inputs of the graph."""

each_op = pytest.mark.parametrize("op", CALLS, ids=lambda op: op.name())


def context(*, eager: bool) -> Context:
    return Context(make_options(min_speedup=0), DEVICES["cpu"], eager=eager)


def graph_of(op: object) -> tuple[fx.GraphModule, fx.Node, list[Tensor]]:
    """graph(tensors...) -> op(arguments), its node, and the tensors."""
    graph, inputs, args = fx.Graph(), [], []
    for argument in CALLS[op]:
        if isinstance(argument, Tensor):
            args.append(graph.placeholder(f"input_{len(inputs)}"))
            inputs.append(argument)
        else:
            args.append(argument)
    node = graph.call_function(op, tuple(args))
    node.meta = {"val": op(*CALLS[op]), "form": "as planned"}
    graph.output(node)
    return fx.GraphModule({}, graph), node, inputs


def test_every_gathered_op_is_tried_here() -> None:
    # a recurrence has several results, of which eager code gets those that a model reads: its own tests compare them
    assert {*CALLS, ops.recurrence_op} == ops.EAGER.keys()


@each_op
def test_eager_graph_calls_the_autograd_function(op: object) -> None:
    module, node, _ = graph_of(op)
    assert lower(module, context(eager=True)) == (module, True)
    assert node.op == "call_function"
    assert node.target is ops.EAGER[op]


@each_op
def test_graph_for_a_compiler_keeps_the_registered_op(op: object) -> None:
    module, node, _ = graph_of(op)
    assert lower(module, context(eager=False)) == (module, False)
    assert node.target is op


@each_op
def test_arguments_and_meta_stay(op: object) -> None:
    module, node, _ = graph_of(op)
    before = (node.args, node.kwargs, copy.copy(node.meta))
    lower(module, context(eager=True))
    assert (node.args, node.kwargs, node.meta) == before


@each_op
def test_lowered_graph_gives_the_same_values(op: object) -> None:
    module, _, inputs = graph_of(op)
    expected = module(*inputs)
    lower(module, context(eager=True))
    module.recompile()
    assert torch.equal(module(*inputs), expected)


@each_op
def test_second_run_changes_nothing(op: object) -> None:
    module, node, _ = graph_of(op)
    lower(module, context(eager=True))
    assert lower(module, context(eager=True)) == (module, False)
    assert node.target is ops.EAGER[op]


def test_other_nodes_are_left() -> None:
    """scale_units is plain PyTorch already; methods and modules have targets of other kinds."""
    graph = fx.Graph()
    node = graph.call_function(ops.scale_units, (graph.placeholder("x"), 2.0, -1))
    node = graph.call_function(operator.add, (graph.call_function(F.relu, (node,)), 1))
    graph.output(graph.call_module("layer", (graph.call_method("view", (node, -1, 4)),)))
    module = fx.GraphModule(nn.ModuleDict({"layer": nn.Linear(4, 2)}), graph)
    before = [n.target for n in graph.nodes]
    assert lower(module, context(eager=True)) == (module, False)
    assert [n.target for n in graph.nodes] == before


def test_every_op_of_a_graph_is_lowered() -> None:
    graph = fx.Graph()
    x, starts = graph.placeholder("x"), graph.placeholder("starts")
    kept = graph.call_function(ops.gather_op, (x, starts, 4, -1))
    graph.output(graph.call_function(ops.scatter_op, (kept, starts, 4, -1, 16)))
    module = fx.GraphModule({}, graph)
    lower(module, context(eager=True))
    called = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert called == [ops.EAGER[ops.gather_op], ops.EAGER[ops.scatter_op]]


def test_lowering_comes_last() -> None:
    """Passes before it match the registered ops; what follows fuses what was lowered, or keeps what it gathers."""
    assert PIPELINE[-4:] == (lower, keep_weights, fuse_activation, check_result)
