"""A graph that Dynamo captured, brought to the form of the passes, rewritten, and given its draws as inputs.

The body of an activation checkpoint is a graph of its own; its draws are operands of the checkpoint, so that it repeats
them.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from dropfx.devices import costs_of
from dropfx.graphs import copy_of, op_name
from dropfx.pass_infra import Context, Options, Pass, run_passes
from dropfx.passes import PIPELINE
from dropfx.runtime import numbers_of_their_own
from dropfx.sharding import is_distributed
from dropfx.site_draws import SiteDraws, grouped
from dropfx.sites import BERNOULLI, DROPOUT_FUNCTIONS, DROPOUT_MODULES, RECURRENT_FUNCTIONS

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


class Part(NamedTuple):
    """The rewritten sites of one graph.

    Attributes:
        draws: of its sites.
        inputs: (site, field of its draw) of each tensor that enters the graph.
        examples: these tensors, as an inner compiler sees them.
        rows: how many tensors [length of a leading axis, 0] the graph returns behind its results, for the record.
    """

    draws: SiteDraws
    inputs: list[tuple[int, str]]
    examples: list[Tensor]
    rows: int


class Naming:
    """Names of the sites of a captured graph and of the checkpoints in it, and of the inputs that they add."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.sites: dict[fx.Node, str] = {}
        self.recurrent: dict[fx.Node, tuple[str, int]] = {}
        self.bernoulli: dict[fx.Node, str] = {}
        self._calls: Counter[str] = Counter()
        self._inputs = itertools.count()
        self._name(module)

    def _name(self, module: fx.GraphModule) -> None:
        bodies = dict(_checkpoints(module, module.graph))
        for node in module.graph.nodes:
            if node in bodies:
                self._name(bodies[node])
            elif node.op == "call_function" and node.target in DROPOUT_FUNCTIONS:
                self.sites[node] = self._site_name(node)
            elif node.op == "call_function" and node.target in RECURRENT_FUNCTIONS:
                path, _ = self._owner(node)
                self._calls[path] += 1
                self.recurrent[node] = path, self._calls[path]
            elif op_name(node) in BERNOULLI:
                kind = f"{self._owner(node)[0]}:bernoulli"
                self._calls[kind] += 1
                self.bernoulli[node] = f"{kind}_{self._calls[kind]}"

    def _owner(self, node: fx.Node) -> tuple[str, Any]:
        """Path and class of the innermost module whose forward makes this call."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path, cls = stack[-1] if stack else ("", None)
        return re.sub(r"^[LG]\['\w+'\]\.?", "", path), cls

    def _site_name(self, node: fx.Node) -> str:
        """Path of the module that drops, as `dropfx.compile` names it."""
        path, cls = self._owner(node)
        if cls in DROPOUT_MODULES:
            self._calls[path] += 1
            return path if self._calls[path] == 1 else f"{path}#{self._calls[path]}"
        self._calls[f"{path}:"] += 1
        return f"{path}:dropout_{self._calls[f'{path}:']}"

    def input_name(self, field: str) -> str:
        """A name for a new input of the graph, which no other input has; `field`: what of a draw it is."""
        return f"dropfx_{field}_{next(self._inputs)}"


def rewrite(
    module: fx.GraphModule, options: Options, naming: Naming, passes: Sequence[Pass] | None = None
) -> tuple[fx.GraphModule, list[Part]]:
    """A rewritten copy, whose further inputs are those of its parts in their order; no parts where nothing fits.

    Args:
        passes: in place of PIPELINE.

    Raises:
        PassError: a pass failed.
    """
    if _transformed(module.graph) or _tensor_parallel(module.graph):
        return module, []
    graph = copy_of(module.graph)  # in the original Dynamo's own notes on the inputs would be lost
    _prepare(module.graph, graph, naming, options.groups == "time")
    _spell_out_sizes(module.graph, graph)
    context = _context(graph, options)
    graph = run_passes(module, graph, PIPELINE if passes is None else passes, context)
    parts = []
    if context.draws:
        _lengths_as_tensors(graph, len(results_of(module.graph)), context)
        fakes = detect_fake_mode([n.meta.get("example_value") for n in module.graph.nodes])
        parts.append(_bind(graph, context, fakes, naming))
    whole = fx.GraphModule(module, graph)
    for node, body in _checkpoints(module, graph):
        made, inner = rewrite(body, options, naming, passes)
        if inner or naming.recurrent or passes is not None:
            made.meta.update(body.meta)  # the policy of a selective checkpoint
            setattr(whole, str(cast(fx.Node, node.args[0]).target), made)
            _pass_on(graph, node, inner, naming)
            parts += inner
    whole.recompile()
    return whole, parts


def _transformed(graph: fx.Graph) -> bool:
    """Whether a transform of torch.func is inside; its tensors stand for others, which the gathered ops do not know."""
    modules = [getattr(n.target, "__module__", None) or "" for n in graph.nodes if n.op == "call_function"]
    return any(name.startswith(("torch._functorch", "torch._C._functorch")) for name in modules)


def _tensor_parallel(graph: fx.Graph) -> bool:
    """Whether a value is a DTensor: the ranks of such a model work on one result, and must drop alike."""
    return any(is_distributed(leaf) for n in graph.nodes for leaf in pytree.tree_leaves(n.meta.get("example_value")))


def results_of(graph: fx.Graph) -> Sequence[Any]:
    """What a graph returns."""
    results: Any = graph.output_node().args[0]
    return tuple(results)


def _checkpoints(module: Any, graph: fx.Graph) -> list[tuple[fx.Node, fx.GraphModule]]:
    """The activation checkpoints of a graph and their bodies."""
    calls: Any = [n for n in graph.nodes if n.op == "call_function" and n.target is CHECKPOINT]
    uses = Counter(n.args[0].target for n in calls)
    # Dynamo gives each checkpoint a body of its own; one that were shared would need draws for each use
    return [(n, module.get_submodule(n.args[0].target)) for n in calls if uses[n.args[0].target] == 1]


def _lengths_as_tensors(graph: fx.Graph, results: int, context: Context) -> None:
    """Return the lengths of leading axes as tensors [length, 0]: AOTAutograd does not take numbers everywhere."""
    output = graph.output_node()
    made: list[Any] = list(results_of(graph))
    with graph.inserting_before(output):
        for place, index in enumerate(grouped(context), results):
            device: dict[str, Any] = {"device": context.sites[index].device}
            made[place] = graph.call_function(torch.empty, ((made[place], 0),), device)
    output.args = (tuple(made),)


def _pass_on(graph: fx.Graph, checkpoint: fx.Node, parts: list[Part], naming: Naming) -> None:
    """Add the inputs of a checkpoint's parts to the graph's, and their rows to its outputs."""
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        inputs = [_placeholder(graph, naming.input_name(field)) for part in parts for _, field in part.inputs]
    checkpoint.args = (*checkpoint.args, *inputs)
    output = graph.output_node()
    body_results = len(checkpoint.meta["val"])
    with graph.inserting_before(output):
        rows = [
            graph.call_function(operator.getitem, (checkpoint, body_results + number))
            for number in range(sum(part.rows for part in parts))
        ]
    output.args = ((*output.args[0], *rows),)  # type: ignore[misc]


# -- from Dynamo's graph to the form of the passes ------------------------------------------------------------------


def _prepare(captured: fx.Graph, graph: fx.Graph, naming: Naming, by_step: bool) -> None:
    """Give the copied nodes what passes read in their meta; `by_step`: there will be a draw a step."""
    memory = _Memory()
    effects = 0
    for source, node in zip(captured.nodes, graph.nodes, strict=True):
        value = source.meta.get("example_value")
        leaves = tuple(value) if isinstance(value, torch.Size) else value  # a leaf to pytree
        node.meta["val"] = pytree.tree_map(memory.concrete, leaves)
        if value is None and node.op in ("call_function", "call_method"):
            node.meta["effect"] = True  # grad mode, autocast, an assertion: it stays where it is
            effects += 1
        node.meta["after_effects"] = effects
        if source in naming.recurrent:
            path, calls = naming.recurrent[source]
            node.meta["recurrent"] = {"path": path, "calls": calls, "live": None}
        if source in naming.bernoulli:
            node.meta["bernoulli"] = naming.bernoulli[source]
        if source in naming.sites:
            if isinstance(value, Tensor):
                int(value.shape[DROPOUT_FUNCTIONS[node.target]])  # its units must not vary: Dynamo guards on them
                if by_step and value.dim() == 3:
                    int(value.shape[0]), int(value.shape[1])  # nor its steps
            rate = source.args[1] if len(source.args) > 1 else source.kwargs.get("p", 0.5)
            node.meta["site"] = {"name": naming.sites[source], "rate": _rate(rate), "live": None}


def _spell_out_sizes(captured: fx.Graph, graph: fx.Graph) -> None:
    """view(x, size(y)) -> view(x, (size(y, 0), size(y, 1), 96)): passes take sizes one by one."""
    for source, node in zip(captured.nodes, list(graph.nodes), strict=True):
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


def _size(graph: fx.Graph, whole: fx.Node, dim: int) -> fx.Node:
    made = graph.call_method("size", (whole.args[0], dim))
    made.meta = {**whole.meta, "val": whole.meta["val"][dim]}
    return made


def _rate(rate: Any) -> Any:
    """A rate that changed once is a symbol to Dynamo; its own dropout fixes it to a number by a guard."""
    value = rate.meta.get("example_value") if isinstance(rate, fx.Node) else rate
    return float(value) if isinstance(value, torch.SymFloat) else value


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

    def _place(self, value: Tensor, sizes: list[int], strides: list[int]) -> Tensor:
        if type(value) is not FakeTensor:  # a wrapper, whose memory is that of what it wraps
            return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        storage = value.untyped_storage()
        offset, length = self.concrete(value.storage_offset()), self.concrete(storage.nbytes())
        key = int(StorageWeakRef(storage).cdata)
        if key not in self._storages:
            self._storages[key] = torch.empty(length, dtype=torch.uint8, device=value.device)
        whole = self._storages[key]
        units = whole[: length - length % value.itemsize].view(value.dtype)
        return units.as_strided(sizes, strides, offset)


def _context(graph: fx.Graph, options: Options) -> Context:
    devices = [v.device for n in graph.nodes if isinstance(v := n.meta.get("val"), Tensor)]
    return Context(options, costs_of(devices[0] if devices else torch.device("cpu")), eager=False)


# -- and on to the inner compiler -----------------------------------------------------------------------------------


def _bind(graph: fx.Graph, context: Context, fakes: FakeTensorMode | None, naming: Naming) -> Part:
    """Keep the tensors of the draws as inputs, and put the numbers, which never change, in their places."""
    pattern = context.options.pattern
    draws = SiteDraws(context, [site.realisation for site in context.sites])
    with numbers_of_their_own():
        drawn = draws.draw()
    inputs: list[tuple[int, str]] = []
    examples: list[Tensor] = []
    for index, nodes in context.draws.items():
        for field in pattern.fields:
            value = getattr(drawn[index], field)
            if isinstance(value, Tensor):
                inputs.append((index, field))
                examples.append(_fake(naming.input_name(field), value, pattern.on_host and field != "lattice", fakes))
                nodes[field]._dynamo_source = None
            elif field == "width" and pattern.on_host:  # the count of runs, of one unit each
                with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
                    nodes[field].replace_all_uses_with(graph.call_method("size", (nodes["starts"], -1)))
                graph.erase_node(nodes[field])
            else:
                substitute(graph, nodes[field], value)
    return Part(draws, inputs, examples, len(grouped(context)))


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    node = graph.placeholder(name)
    node._dynamo_source = None  # Dynamo's guards ask every input for it
    return node


def substitute(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Let all readers of `node` read `value`, a node or a constant, and erase it."""

    def put(operand: fx.Node) -> Any:
        """The operand, or the value in the place of the node."""
        return value if operand is node else operand

    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, put)
        user.kwargs = fx.node.map_arg(user.kwargs, put)
    graph.erase_node(node)


def _fake(name: str, value: Tensor, varies: bool, mode: FakeTensorMode | None) -> Tensor:
    """A draw as the inner compiler sees it; `varies`: by how many units it keeps."""
    if mode is None:
        return value
    if varies and value.size(-1) < 2:  # a compiler would take a size of 1 for one that never varies
        value = value.new_zeros(*value.shape[:-1], 2)
    sizes = [DimDynamic.STATIC] * (value.dim() - 1) + [DimDynamic.DYNAMIC if varies else DimDynamic.STATIC]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(value, symbolic_context=context, source=ConstantSource(f"dropfx_{name}"))
