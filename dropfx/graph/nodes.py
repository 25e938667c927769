"""Small things about fx graphs that several passes need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator

from dropfx.graph.notes import notes
from dropfx.ops.shared_dropout import shared_dropout

_NAMESPACES = ("torch", "_operator", "torch.nn.functional", "torch._C._nn", "torch._VF", "torch.functional")


def op_name(node: fx.Node) -> str:
    """One name for the function, method and operator spelling of an operation: "relu", "add", "view"; "" if foreign.

    An in-place spelling keeps its underscore ("relu_", "iadd").
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function" or not callable(node.target):
        return ""
    module = getattr(node.target, "__module__", None)
    name = getattr(node.target, "__name__", "")
    if module is None:
        # built-in methods of torch._C._VariableFunctions carry no module of their own
        return name if getattr(torch, name, None) is node.target else ""
    return name if module in _NAMESPACES or module.startswith("torch._C") else ""


def value_of(node: Any) -> Tensor | None:
    """The fake tensor that a node stands for, None where it is no tensor or unknown."""
    value = notes(node).get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def parts_of(node: Any) -> list[Tensor] | None:
    """The fake tensors of a node with several results (chunk, split, unbind), None for any other."""
    value = notes(node).get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, (tuple, list)) or not value or not all(isinstance(v, Tensor) for v in value):
        return None
    return list(value)


def memory_order(value: Tensor) -> tuple[int, ...]:
    """The axes of a tensor as they lie in memory, outermost first."""
    strides = value.stride()
    return tuple(sorted(range(value.dim()), key=lambda axis: -strides[axis]))


def is_parameter(node: fx.Node) -> bool:
    """Whether the node stands for a parameter, as Dynamo or another tracer writes it."""
    return node.op == "get_attr" or "parameter" in notes(node)


def matrix_of(weight: fx.Node) -> Any:
    """What tells that two products read the same weight: each spells the transpose of a matrix as a node of its own."""
    return (weight.target, weight.args[0]) if op_name(weight) == "t" and len(weight.args) == 1 else weight


def mark_gradients(graph: fx.Graph) -> None:
    """Set meta["asks_gradient"] of every node: whether a backward through it would reach a leaf that asks for one.

    In a graph traced under no_grad no value says so; yet activation checkpointing runs it again for its gradients.
    """
    for node in graph.nodes:
        value = value_of(node)
        asks = any(notes(operand)["asks_gradient"] for operand in node.all_input_nodes) and op_name(node) != "detach"
        floating = value is None or value.is_floating_point() or value.is_complex()
        notes(node)["asks_gradient"] = floating and (asks or (value is not None and value.requires_grad))


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def switched_off(dropout: fx.Node) -> bool:
    """Whether the call of a dropout asks for evaluation mode, in which it returns its input itself."""
    return argument(dropout, 2, "train" if dropout.target is torch.dropout else "training", True) is False


def impure(node: fx.Node) -> bool:
    """A node that must stay though nobody reads it: module calls, random numbers, writes, what sets a mode."""
    if node.op in ("placeholder", "output", "call_module") or "effect" in notes(node) or node.is_impure():
        return True
    if isinstance(node.target, HigherOrderOperator):  # the body of a checkpoint may do any of this
        return True
    if node.target is shared_dropout:
        return True
    name = op_name(node)
    if node.op != "get_attr" and not name:
        return not (callable(node.target) and getattr(node.target, "__module__", "").startswith(("torch", "dropfx")))
    return writes_in_place(node) or name in _WITH_EFFECTS or name.startswith("rand") or "dropout" in name


_WITH_EFFECTS = frozenset({"bernoulli", "multinomial", "batch_norm", "instance_norm"})
"""What draws, or writes running statistics."""


def writes_in_place(node: fx.Node) -> bool:
    """The operation changes one of its arguments."""
    name = op_name(node)
    if not name:
        return False
    return (
        name.strip("_") in _OPERATOR_INPLACE  # `__iadd__`, called by name, is one too
        or (name.endswith("_") and not name.endswith("__"))
        or node.kwargs.get("inplace") is True
        or node.kwargs.get("out") is not None
        or (name in _POSITIONAL_INPLACE and argument(node, _POSITIONAL_INPLACE[name], "inplace") is True)
    )


_OPERATOR_INPLACE = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul", "setitem"}
)
_POSITIONAL_INPLACE = {"relu": 1, "dropout": 3, "silu": 1, "elu": 2, "leaky_relu": 2, "hardtanh": 3, "celu": 2}


def clean_up(graph: fx.Graph) -> bool:
    """What every pass ends with: dead nodes out, and the graph checked; whether there were any.

    `Graph.eliminate_dead_code` goes on into the bodies of checkpoints, where it takes writes in place for dead.
    """
    modified = False
    for node in reversed(list(graph.nodes)):
        if not node.users and not impure(node):
            graph.erase_node(node)
            modified = True
    graph.lint()
    return modified


def copy_of(graph: fx.Graph) -> fx.Graph:
    """A copy to edit."""
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    return made


def insert(graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A call_function node at the insertion point, with the meta of the node that it stands for."""
    node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    return node


def put_in_place(user: fx.Node, node: fx.Node, value: Any) -> None:
    """Let `user` read `value`, a node or a constant, in the place of `node`."""

    def put(operand: fx.Node) -> Any:
        """The operand, or the value in the place of the node."""
        return value if operand is node else operand

    user.args = fx.node.map_arg(user.args, put)
    user.kwargs = fx.node.map_arg(user.kwargs, put)


def substitute(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Let all readers of `node` read `value`, and erase it."""
    for user in list(node.users):
        put_in_place(user, node, value)
    graph.erase_node(node)
