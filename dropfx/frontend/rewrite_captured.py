"""A captured graph, rewritten: a copy whose draws are further inputs.

The body of an activation checkpoint is a graph of its own; its draws are operands of the checkpoint, so that it repeats
them.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext, constrain_range

from dropfx.draws.runtime import numbers_of_their_own
from dropfx.draws.site_draws import SiteDraws, fields_of, grouped
from dropfx.frontend.checkpoints import checkpoints
from dropfx.frontend.dynamo_graph import Lengths, Live, as_it_is, prepare, results_of
from dropfx.frontend.naming import Naming
from dropfx.graph.device_costs import costs_of
from dropfx.graph.nodes import copy_of, substitute
from dropfx.graph.notes import notes
from dropfx.graph.pass_infra import Context, Pass, run_passes
from dropfx.options import Options
from dropfx.passes import PIPELINE


class Part(NamedTuple):
    """One graph, or body of a checkpoint in it, after the passes.

    Attributes:
        context: the sites and what was decided about them.
        inputs: (site, field of its draw) of each value that enters the graph.
        examples: these values, as an inner compiler sees them; empty where none follows.
        rows: how many lengths of leading axes the graph returns after its results, for the record.
    """

    context: Context
    inputs: list[tuple[int, str]]
    examples: list[Tensor]
    rows: int


class Asked(NamedTuple):
    """What a graph is rewritten for.

    Attributes:
        options: the user's.
        naming: of its sites.
        live: the rates that may change.
        eager: it runs as Python code, not through a further compiler.
        passes: in place of the pipeline.
        lengths: where a call has the sizes that may change: of a whole graph, for the bodies of its checkpoints too.
    """

    options: Options
    naming: Naming
    live: Live
    eager: bool
    passes: Sequence[Pass] | None = None
    lengths: Lengths = MappingProxyType({})


def rewrite_captured(module: fx.GraphModule, asked: Asked) -> tuple[fx.GraphModule, list[Part]]:
    """A rewritten copy, whose further inputs are those of its parts in their order; no parts where nothing drops.

    Raises:
        PassError: a pass failed.
    """
    if as_it_is(module.graph):
        return module, []
    graph = copy_of(module.graph)  # in the original Dynamo's own notes on the inputs would be lost
    prepare(module.graph, graph, asked.naming, asked.live, asked.options.groups == "time")
    context = _context(graph, asked)
    graph = run_passes(module, graph, PIPELINE if asked.passes is None else asked.passes, context)
    _find_batches(context, asked)
    parts = [_bind(module, graph, context, asked)] if context.sites else []
    whole = fx.GraphModule(module, graph)
    for node, body in checkpoints(module, graph):
        made, inner = rewrite_captured(body, asked)
        made.meta.update(body.meta)  # the policy of a selective checkpoint
        setattr(whole, str(cast(fx.Node, node.args[0]).target), made)
        _pass_on(graph, node, inner, asked.naming)
        parts += inner
    whole.recompile()
    return whole, parts


def _context(graph: fx.Graph, asked: Asked) -> Context:
    devices = [v.device for n in graph.nodes if isinstance(v := notes(n).get("val"), Tensor)]
    costs = costs_of(devices[0] if devices else torch.device("cpu"))
    costs = costs if asked.eager else dataclasses.replace(costs, gathered=0.0)  # a compiler takes the products apart
    return Context(asked.options, costs, eager=asked.eager)


def _find_batches(context: Context, asked: Asked) -> None:
    """Where a call has the number of samples of each row site; Dynamo guards on one that is read as a number."""
    for site in context.sites:
        if not site.by_rows or site.node is None:
            continue
        traced = site.node.meta.get("example_value")
        length: Any = traced.shape[site.axis] if isinstance(traced, Tensor) else None
        if isinstance(length, torch.SymInt):
            site.batch = asked.lengths.get(length.node.expr)
            if site.batch is None:
                int(length)


def _bind(module: fx.GraphModule, graph: fx.Graph, context: Context, asked: Asked) -> Part:
    """List what enters the graph; for a compiler its tensors alone."""
    if asked.eager:
        inputs = [(index, field) for index in context.draws for field in fields_of(context, index)]
        return Part(context, inputs, [], len(grouped(context)))
    _lengths_as_tensors(graph, len(results_of(module.graph)), context)
    fakes = detect_fake_mode([n.meta.get("example_value") for n in module.graph.nodes])
    inputs, examples = _tensors_alone(graph, context, fakes, asked.naming)
    return Part(context, inputs, examples, len(grouped(context)))


def _pass_on(graph: fx.Graph, checkpoint: fx.Node, parts: list[Part], naming: Naming) -> None:
    """Add the inputs of a checkpoint's parts to the graph's, and their rows to its outputs."""
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        inputs = [_placeholder(graph, naming.input_name(field)) for part in parts for _, field in part.inputs]
    checkpoint.args = (*checkpoint.args, *inputs)
    output = graph.output_node()
    body_results = len(notes(checkpoint)["val"])
    with graph.inserting_before(output):
        rows = [
            graph.call_function(operator.getitem, (checkpoint, body_results + number))
            for number in range(sum(part.rows for part in parts))
        ]
    output.args = ((*output.args[0], *rows),)  # type: ignore[misc]


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    node = graph.placeholder(name)
    node._dynamo_source = None  # Dynamo's guards ask every input for it
    return node


# -- what further compilers take ------------------------------------------------------------------------------------


def _lengths_as_tensors(graph: fx.Graph, results: int, context: Context) -> None:
    """Return the lengths of leading axes as tensors [length, 0]: AOTAutograd does not take numbers everywhere."""
    output = graph.output_node()
    made: list[Any] = list(results_of(graph))
    with graph.inserting_before(output):
        for place, index in enumerate(grouped(context), results):
            device: dict[str, Any] = {"device": context.sites[index].device}
            made[place] = graph.call_function(torch.empty, ((made[place], 0),), device)
    output.args = (tuple(made),)


def _tensors_alone(
    graph: fx.Graph, context: Context, fakes: FakeTensorMode | None, naming: Naming
) -> tuple[list[tuple[int, str]], list[Tensor]]:
    """Keep the tensors of the draws as inputs, and put the numbers, which never change, in their places."""
    with numbers_of_their_own():
        drawn = SiteDraws(context, [site.fit for site in context.sites]).draw()
    inputs: list[tuple[int, str]] = []
    examples: list[Tensor] = []
    for index, nodes in context.draws.items():
        pattern = context.sites[index].pattern or context.options.pattern
        for field in pattern.fields:
            value = getattr(drawn[index], field)
            if isinstance(value, Tensor):
                inputs.append((index, field))
                varies = pattern.on_host and field in _VARY and value.dim() > 0
                examples.append(made := _fake(naming.input_name(field), value, varies, fakes))
                fit = context.sites[index].fit
                if varies and fit is not None and context.sites[index].batch is None:
                    counted: Any = made.size(-1)
                    constrain_range(counted, min=1, max=fit.units)
                nodes[field]._dynamo_source = None
            elif field == "width" and pattern.on_host:  # the count of runs, of one unit each
                with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
                    nodes[field].replace_all_uses_with(graph.call_method("size", (nodes["starts"], -1)))
                graph.erase_node(nodes[field])
            else:
                substitute(graph, nodes[field], value)
    return inputs, examples


_VARY = ("starts", "rows", "scale")
"""What of a draw made on the host has another length in another draw."""


def _fake(name: str, value: Tensor, varies: bool, mode: FakeTensorMode | None) -> Tensor:
    """A draw as the inner compiler sees it; `varies`: by how many units it keeps."""
    if mode is None:
        return value
    if varies and value.size(-1) < 2:  # a compiler would take a size of 1 for one that never varies
        value = value.new_zeros(*value.shape[:-1], 2)
    sizes = [DimDynamic.STATIC] * value.dim()
    if varies:
        sizes[-1] = DimDynamic.DYNAMIC
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(value, symbolic_context=context, source=ConstantSource(f"dropfx_{name}"))


def take_back_guards(draws: Sequence[Tensor]) -> bool:
    """Take guards on the sizes of draws back, which no call can check; whether there were any that may not hold."""
    shapes: list[Any] = [draw.shape for draw in draws]
    sizes = [size for shape in shapes for size in shape if isinstance(size, torch.SymInt)]
    if not sizes:
        return False
    symbols = {symbol for size in sizes for symbol in size.node.expr.free_symbols}
    env = sizes[0].node.shape_env
    on_draws = [guard for guard in env.guards if symbols & guard.expr.free_symbols]
    unsettled = [guard for guard in on_draws if env._maybe_evaluate_static(guard.expr, axioms=()) is None]
    env.guards[:] = [guard for guard in env.guards if guard not in unsettled]
    return bool(unsettled)
