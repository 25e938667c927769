"""Graphs of other tracers: `dropfx.rewrite` runs the passes on them, `dropfx.Tracer` makes them.

What a tracer bakes into its graph is fixed (branches on data and on Python values, sizes that became numbers). These
are torch.fx's own limits; `dropfx.compile` has none of them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from dropfx.draws.runtime import runtime
from dropfx.draws.site_draws import SiteDraws, fields_of
from dropfx.errors import InvalidInput, InvalidModel, InvalidOption
from dropfx.frontend.naming import Naming
from dropfx.frontend.rates import rate_of
from dropfx.graph.device_costs import costs_of
from dropfx.graph.dropout_ops import RECURRENT_MODULES
from dropfx.graph.nodes import substitute
from dropfx.graph.notes import Dropping, notes
from dropfx.graph.pass_infra import Context, run_passes
from dropfx.options import make_options
from dropfx.passes import PIPELINE


class Tracer(fx.Tracer):
    """torch.fx's tracer, without a `training` flag baked into functional dropouts.

    Modules of torch.nn stay calls, as in torch.fx: dropouts, Linear and recurrent layers among them. `F.dropout(x,
    self.p, self.training)` reads the flag from its module at each call.

    Raises (from `trace`):
        torch.fx.proxy.TraceError: a forward branches on `self.training`, or on data.
    """

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of root's forward."""
        modules = dict(root.named_modules()) if isinstance(root, nn.Module) else {}
        flags = {path: module.training for path, module in modules.items()}
        try:
            for path, module in modules.items():
                module.training = _Flag(module.training, f"{path}.training".lstrip("."))
            return super().trace(root, concrete_args)
        finally:
            for path, module in modules.items():
                module.training = flags[path]

    def create_arg(self, a: Any) -> Any:
        """What fx calls for each argument of a node."""
        return self.create_node("get_attr", a.path, (), {}) if isinstance(a, _Flag) else super().create_arg(a)


class _Flag(int):
    """`module.training` while it is traced."""

    path: str

    def __new__(cls, value: bool, path: str) -> _Flag:
        made = super().__new__(cls, value)
        made.path = path
        return made

    def __bool__(self) -> bool:
        raise fx.proxy.TraceError(f"the forward branches on {self.path}, which a graph of torch.fx would bake in")


class _Inliner(fx.Tracer):
    """Makes the functions of a graph's modules visible: the passes know functions."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """What fx calls: modules that keep their dropouts to themselves stay calls."""
        return isinstance(m, nn.MultiheadAttention)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What fx calls: a recurrent layer becomes the function that it calls, for inputs [T, B, I] or [B, T, I]."""
        if isinstance(m, RECURRENT_MODULES):
            return super().call_module(m, lambda *a, **k: _recurrent(m, *a, **k), args, kwargs)
        return super().call_module(m, forward, args, kwargs)


def _recurrent(module: nn.RNNBase, x: Any, hx: Any = None) -> Any:
    batch = x.size(0 if module.batch_first else 1)
    lead = module.num_layers * (2 if module.bidirectional else 1)
    if hx is None:
        hx = x.new_zeros(lead, batch, module.proj_size or module.hidden_size)
        hx = (hx, x.new_zeros(lead, batch, module.hidden_size)) if module.mode == "LSTM" else hx
    function = getattr(torch, module.mode.lower())
    options = (module.bias, module.num_layers, module.dropout, module.training, module.bidirectional)
    made = function(x, hx, list(module._flat_weights), *options, module.batch_first)
    return made[0], (made[1], made[2]) if module.mode == "LSTM" else made[1]


def rewrite(
    graph_module: fx.GraphModule, *example_inputs: Any, options: dict[str, Any] | None = None
) -> fx.GraphModule:
    """Run the passes on a graph of any fx tracer: `torch.fx.symbolic_trace`, or `dropfx.Tracer`.

    Args:
        graph_module: dropouts and recurrent layers in it may be modules or functions. It does not change.
        example_inputs: tensors of one training call; other sizes may follow where the graph reads its sizes.
        options: those of `dropfx.compile`.

    Returns:
        A module with the same parts and parameters. In training mode it runs the rewritten graph, with fresh draws per
        call; in eval mode it runs the graph of `graph_module`. Rates are fixed at their present values.

    Raises:
        InvalidModel (TypeError): `graph_module` is no GraphModule.
        InvalidOption (ValueError), InvalidInput (ValueError): as `dropfx.compile` does.
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise InvalidModel(f"graph_module: got {type(graph_module).__name__}, accepted is a torch.fx.GraphModule")
    if options is not None and not isinstance(options, dict):
        raise InvalidOption(f"options: got {type(options).__name__}, accepted is a dict of dropfx.compile's options")
    checked = make_options(**(options or {}))
    flags = {module: module.training for module in graph_module.modules()}
    try:
        graph_module.train()
        graph = functions(graph_module, example_inputs)
    finally:
        for module, training in flags.items():
            module.training = training
    results = _flat_results(graph)
    devices = [v.device for n in graph.nodes if isinstance(v := notes(n).get("val"), Tensor)]
    costs = costs_of(devices[0] if devices else torch.device("cpu"))
    context = Context(checked, costs, knows_batches=False)
    graph = run_passes(graph_module, graph, PIPELINE, context)
    made = fx.GraphModule(graph_module, graph, class_name="Rewritten")
    _draw_inside(made, context, results)
    made.training = graph_module.training
    return _live_mode(made, graph_module)


def functions(module: nn.Module, inputs: tuple[Any, ...]) -> fx.Graph:
    """The graph of a module in calls of functions, with fake values."""
    graph = _Inliner().trace(module)
    for node in list(graph.nodes):
        if node.op == "get_attr" and isinstance(value := operator.attrgetter(node.target)(module), (bool, int)):
            substitute(graph, node, value)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        FakeTensorProp(fx.GraphModule(module, graph), mode).propagate(*inputs)
    except Exception as error:
        raise InvalidInput(f"example_inputs: the graph fails on them: {error}") from error
    _name_sites(graph)
    return graph


def _flat_results(graph: fx.Graph) -> pytree.TreeSpec:
    """Let the graph return its results one by one, as the passes expect; how they belong together."""
    output = graph.output_node()
    leaves, results = pytree.tree_flatten(output.args[0])
    output.args = (tuple(leaves),)
    return results


def _name_sites(graph: fx.Graph) -> None:
    naming = Naming(list(graph.nodes))
    kinds = {"site": naming.sites, "recurrent": naming.recurrent}
    for kind, calls in kinds.items():
        for node, call in calls.items():
            node.meta[kind] = Dropping(call, rate_of(node))
    for kind, others in {"bernoulli": naming.bernoulli, "other": naming.others}.items():
        for node, call in others.items():
            node.meta[kind] = call


def _draw_inside(made: fx.GraphModule, context: Context, results: pytree.TreeSpec) -> None:
    """Let the graph make its draws itself: their inputs become the results of a module that it calls first."""
    graph, output = made.graph, made.graph.output_node()
    leaves: Any = output.args[0]
    output.args = (pytree.tree_unflatten(leaves[: results.num_leaves], results),)
    if context.draws:
        draws = Draws(context)
        made.add_submodule("dropfx_draws", draws)
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            drawn = graph.call_module("dropfx_draws")
            for number, (index, field) in enumerate(draws.places):
                part = graph.call_function(operator.getitem, (drawn, number))
                context.draws[index][field].replace_all_uses_with(part)
                graph.erase_node(context.draws[index][field])
        with graph.inserting_before(output):
            graph.call_module("dropfx_draws.record", leaves[results.num_leaves :])
    made.recompile()


class Draws(nn.Module):
    """The draws of a rewritten graph; each call makes fresh ones."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.places = [(index, field) for index in context.draws for field in fields_of(context, index)]
        self.record = Record(SiteDraws(context, [site.fit for site in context.sites]))

    def forward(self) -> list[Any]:
        """What enters the graph."""
        drawn = self.record.drawn = self.record.draws.draw()
        return [getattr(drawn[index], field) for index, field in self.places]


class Record(nn.Module):
    """Notes the last draws for `dropfx.testing.record`."""

    def __init__(self, draws: SiteDraws) -> None:
        super().__init__()
        self.draws, self.drawn = draws, dict[int, Any]()

    def forward(self, *rows: int) -> None:
        """`rows`: lengths of the leading axes of the sites with groups."""
        with runtime.outermost():
            if runtime.frame is not None:
                self.draws.record(runtime.frame, self.drawn, rows)


def _live_mode(made: fx.GraphModule, original: fx.GraphModule) -> fx.GraphModule:
    """Let the module, whose parts are the original's, run its graph in eval mode."""
    for name, child in original.named_children():
        made.add_module(name, child)
    cls: Any = type(made)  # a GraphModule's class is its own
    rewritten, as_written = cls.forward, type(original).forward

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        """The rewritten graph in training, the graph that was given in eval."""
        return rewritten(self, *args, **kwargs) if self.training else as_written(self, *args, **kwargs)

    cls.forward = forward
    return made
