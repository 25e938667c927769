"""Rates of a captured graph's dropouts that may change from call to call: read from what the call brings along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dropfx.frontend.checkpoints import walk
from dropfx.graph.dropout_ops import DROPOUT_FUNCTIONS, RECURRENT_FUNCTIONS, recurrent_names
from dropfx.graph.nodes import argument

_ARITHMETIC = ("_operator", "math", "builtins")


class Rates:
    """The numbers that dropouts of a graph take as arguments, in the order of the forward.

    Attributes:
        places: dropout -> number of its rate; None for a constant, absent where only running the graph would tell.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.places: dict[fx.Node, int | None] = {}
        self._inputs = {node: place for place, node in enumerate(module.graph.find_nodes(op="placeholder"))}
        self._live: dict[fx.Node, int] = {}
        self._operands: list[Mapping[fx.Node, Any]] = []
        for node, operands in walk(module):
            rate = rate_of(node)
            if rate is None:
                continue
            if not isinstance(rate, fx.Node):
                self.places[node] = None
            elif self._known(rate, operands):
                if rate not in self._live:
                    self._live[rate] = len(self._live)
                    self._operands.append(operands)
                self.places[node] = self._live[rate]

    def _known(self, node: fx.Node, operands: Mapping[fx.Node, Any]) -> bool:
        """Whether it is arithmetic of numbers that a call brings along."""
        if node.op == "placeholder":
            outer = operands.get(node)
            return self._known(outer, operands) if isinstance(outer, fx.Node) else node in self._inputs
        plain = node.op == "call_function" and getattr(node.target, "__module__", None) in _ARITHMETIC
        known = (node.op == "call_method" and node.target == "item") or plain or node.target is torch.sym_float
        return known and all(self._known(operand, operands) for operand in node.all_input_nodes)

    def __call__(self, inputs: Sequence[Any]) -> tuple[float, ...]:
        """The rates of a call."""
        if not self._live:
            return ()
        pairs = zip(self._live, self._operands, strict=True)
        return tuple([float(self._value(node, operands, inputs)) for node, operands in pairs])

    def _value(self, node: fx.Node, operands: Mapping[fx.Node, Any], inputs: Sequence[Any]) -> Any:
        if node.op == "placeholder":
            outer = operands.get(node)
            return self._value(outer, operands, inputs) if isinstance(outer, fx.Node) else inputs[self._inputs[node]]
        args: Any = fx.node.map_arg(node.args, lambda operand: self._value(operand, operands, inputs))
        return args[0].item() if node.op == "call_method" else node.target(*args)  # type: ignore[operator]

    def hints(self) -> tuple[float, ...]:
        """The rates as they were when the graph was captured."""
        return tuple(_hint(node) for node in self._live)


def rate_of(node: fx.Node) -> Any:
    """The rate that a dropout, or a recurrent function with dropouts between its layers, is given; None for others."""
    if node.op != "call_function":
        return None
    if node.target in DROPOUT_FUNCTIONS:
        return argument(node, 1, "p", 0.5)
    if node.target in RECURRENT_FUNCTIONS:
        return argument(node, recurrent_names(node.args).index("dropout"), "dropout")
    return None


def _hint(node: fx.Node) -> float:
    value: Any = node.meta.get("example_value")
    return float(value.node.hint if isinstance(value, torch.SymFloat) else value)
