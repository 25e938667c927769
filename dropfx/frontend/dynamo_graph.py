"""A graph that Dynamo captured, brought to the form of the passes: functional calls with fake values in their meta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import SymFloat, Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from dropfx.frontend.dtensor import is_distributed
from dropfx.frontend.naming import Naming
from dropfx.frontend.rates import rate_of
from dropfx.graph.dropout_ops import BERNOULLI, DROPOUT_FUNCTIONS
from dropfx.graph.nodes import argument, op_name, put_in_place, substitute, switched_off
from dropfx.graph.notes import Dropping, notes


def as_it_is(graph: fx.Graph) -> bool:
    """Whether nothing of a graph can be rewritten.

    A transform of torch.func is inside, whose tensors stand for others, which the gathered ops do not know; or a value
    is a DTensor: the ranks of such a model work on one result, and must drop alike.
    """
    modules = [getattr(n.target, "__module__", None) or "" for n in graph.nodes if n.op == "call_function"]
    if any(name.startswith(("torch._functorch", "torch._C._functorch")) for name in modules):
        return True
    values = (leaf for n in graph.nodes for leaf in pytree.tree_leaves(n.meta.get("example_value")))
    return any(map(is_distributed, values))


def results_of(graph: fx.Graph) -> Sequence[Any]:
    """What a graph returns."""
    results: Any = graph.output_node().args[0]
    return tuple(results)


Live = Mapping[fx.Node, tuple[Any, int | None]]
"""Dropout -> its present rate, and the number of the rate among those that a call brings along."""


def prepare(captured: fx.Graph, graph: fx.Graph, naming: Naming, live: Live, by_step: bool) -> None:
    """Give the copied nodes what passes read in their meta.

    Args:
        live: rates that are no constants of the graph.
        by_step: there will be a draw per time step.
    """
    memory = _Memory()
    effects = 0
    for source, node in zip(captured.nodes, graph.nodes, strict=True):
        value = source.meta.get("example_value")
        rate, number = live.get(source, (rate_of(source), None))
        if source in naming.sites and (rate == 0 or switched_off(source)):
            memory.share(value, argument(source, 0, "input"))
        leaves = tuple(value) if isinstance(value, torch.Size) else value  # a leaf to pytree
        notes(node)["val"] = pytree.tree_map(memory.concrete, leaves)
        if value is None and node.op in ("call_function", "call_method"):
            notes(node)["effect"] = True  # grad mode, autocast, an assertion: it stays where it is
            effects += 1
        notes(node)["after_effects"] = effects
        if isinstance(value, nn.Parameter):
            notes(node)["parameter"] = True
        if source in naming.recurrent:
            notes(node)["recurrent"] = Dropping(naming.recurrent[source], rate, number)
        if source in naming.bernoulli:
            notes(node)["bernoulli"] = naming.bernoulli[source]
        if source in naming.others:
            notes(node)["other"] = naming.others[source]
        if source in naming.sites:
            if isinstance(value, Tensor):
                _fix_sizes(value, DROPOUT_FUNCTIONS[source.target], by_step)
            notes(node)["site"] = Dropping(naming.sites[source], rate, number)
    _spell_out_rates(captured, graph)
    _spell_out_sizes(captured, graph)  # the last one: nodes are no longer pairs behind it


def _fix_sizes(dropped: Tensor, axis: int, by_step: bool) -> None:
    """What a draw is made for: Dynamo guards on each size that is read as a number."""
    if -axis <= dropped.dim():
        int(dropped.shape[axis])
    if by_step and dropped.dim() == 3:
        int(dropped.shape[0]), int(dropped.shape[1])


def _spell_out_rates(captured: fx.Graph, graph: fx.Graph) -> None:
    """bernoulli_(x, 1 - p) -> bernoulli_(x, .5): of a mask made by hand Dynamo guards on the numbers."""
    nodes = list(zip(captured.nodes, graph.nodes, strict=True))
    numbers = {source: value for source, _ in nodes if isinstance(value := source.meta.get("example_value"), SymFloat)}
    drawn = (operand for source, _ in nodes if op_name(source) in BERNOULLI for operand in source.all_input_nodes)
    fixed = {symbol for operand in drawn if operand in numbers for symbol in numbers[operand].node.expr.free_symbols}
    for source, node in nodes:
        if source in numbers and fixed.issuperset(numbers[source].node.expr.free_symbols):
            for user in list(node.users):
                put_in_place(user, node, float(numbers[source]))


def _spell_out_sizes(captured: fx.Graph, graph: fx.Graph) -> None:
    """view(x, size(y)) -> view(x, (size(y, 0), size(y, 1), 96)): passes take sizes one by one, of the tensors."""
    pairs = list(zip(captured.nodes, list(graph.nodes), strict=True))
    _ask_inputs(graph, pairs)
    for source, node in pairs:
        value: Any = source.meta.get("example_value")
        if not isinstance(value, torch.Size):
            continue
        with graph.inserting_after(node):
            if node.op == "call_method":
                fixed: tuple[Any, ...] = tuple(value)
                sizes = [_size(graph, node, dim) if isinstance(s, torch.SymInt) else s for dim, s in enumerate(fixed)]
            else:  # torch.Size of a list
                sizes = list(node.args[0])
        substitute(graph, node, tuple(sizes))


Lengths = Mapping[Any, tuple[int, int | None]]
"""Symbol of a size -> number of an input that a call has it of, and its axis where that input is a tensor."""


def lengths_of_inputs(captured: fx.Graph) -> Lengths:
    """Where a call has the sizes that may change from call to call."""
    found: dict[Any, tuple[int, int | None]] = {}
    for place, node in enumerate(captured.find_nodes(op="placeholder")):
        value = node.meta.get("example_value")
        sizes: Any = enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]
        for dim, size in sizes:
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, (place, dim))
    return found


def _ask_inputs(graph: fx.Graph, pairs: list[tuple[fx.Node, fx.Node]]) -> None:
    """graph(s0, x [s0, 96]): s0 -> size(x, 0)"""
    inputs: list[tuple[Any, fx.Node]] = [
        (source.meta.get("example_value"), node) for source, node in pairs if node.op == "placeholder"
    ]
    axes: dict[Any, tuple[fx.Node, int]] = {}
    for value, node in inputs:
        sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, Tensor) else ()
        for dim, size in enumerate(sizes):
            if isinstance(size, torch.SymInt):
                axes.setdefault(size.node.expr, (node, dim))
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        for value, node in inputs:
            if isinstance(value, torch.SymInt) and node.users and value.node.expr in axes:
                made = graph.call_method("size", axes[value.node.expr])
                made.meta = dict(node.meta)
                node.replace_all_uses_with(made)


def _size(graph: fx.Graph, whole: fx.Node, dim: int) -> fx.Node:
    made = graph.call_method("size", (whole.args[0], dim))
    made.meta = {**whole.meta, "val": notes(whole)["val"][dim]}
    return made


class _Memory:
    """Fake tensors of the sizes that Dynamo traced with; those that share memory there do so here."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: dict[int, Tensor] = {}

    def concrete(self, value: Any) -> Any:
        """The value as it was traced, None where its size is known only when it runs."""
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return value.node.hint
        if not isinstance(value, Tensor):
            return value
        if value.layout != torch.strided:
            return None
        sizes, strides = ([self.concrete(s) for s in numbers] for numbers in (value.shape, value.stride()))
        if None in sizes or None in strides:
            return None
        with self._mode:
            made = self._place(value, sizes, strides)
        return made.requires_grad_(value.requires_grad)

    def share(self, dropped: Any, source: Any) -> None:
        """A dropout that drops nothing returns its input itself, where the fake one returns a copy."""
        given = source.meta.get("example_value") if isinstance(source, fx.Node) else None
        if type(dropped) is not FakeTensor or type(given) is not FakeTensor or given.layout != torch.strided:
            return
        same = given.stride() == dropped.stride() and given.storage_offset() == dropped.storage_offset()
        if same and self.concrete(given) is not None:
            self._storages[_key(dropped)] = self._storages[_key(given)]

    def _place(self, value: Tensor, sizes: list[int], strides: list[int]) -> Tensor:
        if type(value) is not FakeTensor:  # a wrapper, whose memory is that of what it wraps
            return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        storage = value.untyped_storage()
        offset, length = self.concrete(value.storage_offset()), self.concrete(storage.nbytes())
        key = _key(value)
        if key not in self._storages:
            self._storages[key] = torch.empty(length, dtype=torch.uint8, device=value.device)
        whole = self._storages[key]
        units = whole[: length - length % value.itemsize].view(value.dtype)
        return units.as_strided(sizes, strides, offset)


def _key(value: Tensor) -> int:
    return int(StorageWeakRef(value.untyped_storage()).cdata)
