"""`torch.compile(model, backend="dropfx")`: the same passes on the graph that Dynamo captures.

Dynamo hands over functional calls whose parameters are placeholders. The passes run on a copy; the draws become further
inputs of what goes on to Inductor, so that no partitioner can redraw, merge or hoist them.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from dropfx.devices import costs_of
from dropfx.errors import InvalidOption, PassError
from dropfx.options import make_options
from dropfx.pass_infra import Context, Options, run_passes
from dropfx.passes import PIPELINE
from dropfx.runtime import numbers_of_their_own, runtime
from dropfx.sharding import is_distributed
from dropfx.site_draws import SiteDraws
from dropfx.sites import DROPOUT_FUNCTIONS, DROPOUT_MODULES

INNER = ("inductor", "aot_eager", "eager")
Compiled = Callable[..., Sequence[Any]]


def backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """What `torch.compile(model, backend="dropfx")` calls with each captured graph.

    Args:
        options: those of `dropfx.compile`, and `inner`, what compiles the rewritten graph: "inductor" (default),
            "aot_eager" or "eager"; `inner_options`: Inductor's.
        mode: Inductor's, such as "reduce-overhead".

    Raises:
        InvalidOption (ValueError): an option is unknown or not accepted.
    """
    given = dict(options or {})
    inner, inner_options = given.pop("inner", "inductor"), given.pop("inner_options", None)
    compile_inner: Callable[..., Compiled] = _inner(inner, inner_options, mode)
    checked = make_options(**given)
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    results = len(_results(module.graph))
    if not _prepare(module.graph, graph):
        return compile_inner(module, example_inputs)
    context = _context(graph, checked)
    try:
        run_passes(module, graph, PIPELINE, context)
    except PassError as error:
        warnings.warn(f"dropfx: {error}; the graph is compiled as written", RuntimeWarning, stacklevel=2)
        return compile_inner(module, example_inputs)
    if not any(site.rewritten for site in context.sites):
        return compile_inner(module, example_inputs)
    draws = SiteDraws(context, [site.realisation for site in context.sites])
    names, examples = _bind(graph, context, draws)
    fakes = detect_fake_mode([n.meta.get("example_value") for n in module.graph.nodes])
    inputs = [
        _fake(f"{field}_{index}", value, checked.pattern.on_host and field != "lattice", fakes)
        for (index, field), value in zip(names, examples, strict=True)
    ]
    compiled = compile_inner(fx.GraphModule(module, graph), [*example_inputs, *inputs])

    def run(*args: Any) -> Sequence[Any]:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            # DDP's graphs are cut at its buckets: Dynamo asks one part for the kinds of the next one's inputs
            return compiled(*args, *inputs)[:results]
        with runtime.outermost():
            drawn = draws.draw()
            outputs = compiled(*args, *(getattr(drawn[index], field) for index, field in names))
            if runtime.frame is not None:
                draws.record(drawn, outputs[results:])
        return outputs[:results]

    return run


def _inner(inner: str, inner_options: dict[str, Any] | None, mode: str | None) -> Callable[..., Any]:
    if inner not in INNER:
        raise InvalidOption(f"inner: got {inner!r}, accepted are {', '.join(map(repr, INNER))}")
    if inner_options is not None and not isinstance(inner_options, dict):
        raise InvalidOption(f"inner_options: got {inner_options!r}, accepted is a dict of Inductor's options")
    if inner != "inductor":
        if inner_options or mode not in (None, "default"):
            raise InvalidOption(f"inner_options and mode are Inductor's, but inner is {inner!r}")
        return lookup_backend(inner)
    from torch._inductor.compile_fx import compile_fx  # slow to import, and not needed for the other two

    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **(inner_options or {})}

    def inductor(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_fx(module, inputs, config_patches=patches)

    return inductor


def _results(graph: fx.Graph) -> Sequence[Any]:
    results: Any = graph.output_node().args[0]
    return tuple(results)


# -- from Dynamo's graph to the form of the passes ------------------------------------------------------------------


def _prepare(captured: fx.Graph, graph: fx.Graph) -> bool:
    """Give the copied nodes `val` and `site`; False where no dropout is active, or none may be rewritten."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    calls: Counter[str] = Counter()
    dropouts = 0
    for source, node in zip(captured.nodes, graph.nodes, strict=True):
        value = source.meta.get("example_value")
        if any(map(is_distributed, pytree.tree_leaves(value))):
            return False  # tensor-parallel: its ranks work on one result, and must drop alike
        node.meta["val"] = pytree.tree_map(lambda leaf: _concrete(leaf, mode), value)
        if node.op == "call_function" and node.target in DROPOUT_FUNCTIONS:
            dropouts += 1
            if isinstance(value, Tensor):
                int(value.shape[DROPOUT_FUNCTIONS[node.target]])  # its units must not vary: Dynamo guards on them
            rate = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            node.meta["site"] = {"name": _site_name(source, calls), "rate": rate, "live": None}
    return dropouts > 0


def _concrete(value: Any, mode: FakeTensorMode) -> Any:
    """The value that Dynamo traced with, of the sizes that it had; None where these are known only when it runs."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if not isinstance(value, Tensor):
        return value
    sizes, strides = ([_concrete(s, mode) for s in numbers] for numbers in (value.shape, value.stride()))
    if None in sizes or None in strides:
        return None
    with mode:
        made = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    return made.requires_grad_(value.requires_grad)


def _site_name(node: fx.Node, calls: Counter[str]) -> str:
    """Path of the module that drops, as `dropfx.compile` names it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, cls = stack[-1] if stack else ("", None)
    path = re.sub(r"^L\['\w+'\]\.?", "", path)
    if cls in DROPOUT_MODULES:
        calls[path] += 1
        return path if calls[path] == 1 else f"{path}#{calls[path]}"
    calls[f"{path}:"] += 1
    return f"{path}:dropout_{calls[f'{path}:']}"


def _context(graph: fx.Graph, options: Options) -> Context:
    devices = [v.device for n in graph.nodes if isinstance(v := n.meta.get("val"), Tensor)]
    return Context(options, costs_of(devices[0] if devices else torch.device("cpu")), eager=False)


# -- and on to the inner compiler -----------------------------------------------------------------------------------


def _bind(graph: fx.Graph, context: Context, draws: SiteDraws) -> tuple[list[tuple[int, str]], list[Tensor]]:
    """Keep the tensors of the draws as inputs, and put the numbers, which never change, in their places.

    Returns (site, field) of each input, in order, and an example of each.
    """
    with numbers_of_their_own():
        examples = draws.draw()
    names: list[tuple[int, str]] = []
    values: list[Tensor] = []
    for index, nodes in context.draws.items():
        for field in context.options.pattern.fields:
            value = getattr(examples[index], field)
            if isinstance(value, Tensor):
                names.append((index, field))
                values.append(value)
                nodes[field]._dynamo_source = None
            elif field == "width" and context.options.pattern.on_host:  # the count of runs, of one unit each
                with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
                    nodes[field].replace_all_uses_with(graph.call_method("size", (nodes["starts"], -1)))
                graph.erase_node(nodes[field])
            else:
                _substitute(graph, nodes[field], value)
    return names, values


def _substitute(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    def put(operand: fx.Node) -> Any:
        return value if operand is node else operand

    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, put)
        user.kwargs = fx.node.map_arg(user.kwargs, put)
    graph.erase_node(node)


def _fake(name: str, value: Tensor, varies: bool, mode: FakeTensorMode | None) -> Tensor:
    """A draw as the inner compiler sees it; `varies`: by how many units it keeps."""
    if mode is None:
        return value
    sizes = [DimDynamic.STATIC] * (value.dim() - 1) + [DimDynamic.DYNAMIC if varies else DimDynamic.STATIC]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(value, symbolic_context=context, source=ConstantSource(f"dropfx_{name}"))
