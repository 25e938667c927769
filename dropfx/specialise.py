"""A specialisation: one compiled forward of one module, and when it holds.

Its key is what the call shows (kinds of inputs, grad mode, autocast). Beyond the key it holds while every attribute
that the trace read, every module that it looked into and the kind of every rate are as they were.
"""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dropfx.devices import costs_of
from dropfx.draws import Draw, TileDraw
from dropfx.graphs import copy_of, op_name
from dropfx.packed import opened
from dropfx.pass_infra import Context, Options, Site, run_passes
from dropfx.passes import AS_WRITTEN, PIPELINE
from dropfx.patterns import PatternRefused, Realisation
from dropfx.runtime import runtime
from dropfx.shared_dropout import shared_dropout
from dropfx.site_draws import SiteDraws
from dropfx.sites import BERNOULLI
from dropfx.tracing import Trace, hooked, trace

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)
_numbers = itertools.count()


def key_of(leaves: list[Any]) -> tuple[Any, ...] | None:
    """Key of a call from the leaves of its inputs; None where an input's kind is not supported."""
    parts: list[Any] = [torch.is_grad_enabled()]
    for leaf in leaves:
        kind = type(leaf)
        if kind is Tensor or kind is nn.Parameter:
            # sizes 0 and 1 broadcast and contract differently, as in PyTorch's own dynamic shapes
            sizes = tuple([s if s < 2 else 2 for s in leaf.shape])
            parts.append((leaf.dtype, leaf.device, leaf.requires_grad, leaf.is_contiguous(), sizes))
        elif kind in _CONSTANTS:
            parts.append((kind, leaf))
        else:
            return None
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            parts.append((device, torch.get_autocast_dtype(device)))
    return tuple(parts)


class Specialisation:
    """A traced and rewritten forward.

    Attributes:
        keep_all: run it with all units kept, where the original forward would go on dropping by masks made by hand.

    Args:
        root: the module; not kept, but its submodules are, for the checks.
        prefix: path of root in the compiled model, "" or ending in a dot.
    """

    def __init__(
        self,
        root: nn.Module,
        prefix: str,
        options: Options,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        original_class: Callable[[nn.Module], type],
    ) -> None:
        runtime.traces += 1
        traced = trace(root, args, kwargs, original_class)
        self.leaves = traced.leaves
        kept = _with_masks_recognised(root, traced.graph, options)
        self.context = _transform(root, traced, prefix, options)
        # a leading axis of 1 may be a size or a broadcast, which only its value tells
        lone = options.grouped and any(site.rewritten and site.leading == 1 for site in self.context.sites)
        by_step = options.groups == "time" and any(site.groups > 1 for site in self.context.sites)
        self.shapes = _shapes(args, kwargs) if traced.exact_shapes or lone or by_step else None
        self.sites = [s for s in self.context.sites if s.rewritten]
        self._results = traced.out_spec.num_leaves
        self._out_spec = None if traced.out_spec.is_leaf() else traced.out_spec
        self._visited = traced.visited
        self.note_classes(root)
        self._children = [(root.get_submodule(p)._modules, len(root.get_submodule(p)._modules)) for p in traced.visited]
        self._guards = [(root.get_submodule(g.path), g.name, g.check, g.expected) for g in traced.guards]
        self._rate_sources = [_rate_source(root, site) for site in self.context.sites]
        self._kinds = [_kind(site.rate, site, options) for site in self.context.sites]
        self._rates: tuple[float, ...] = ()
        self._options = options
        self._run = _generate(traced.graph)
        self.keep_all = None if kept is None else self._as_written(kept)
        self._read_rates()

    def note_classes(self, root: nn.Module) -> None:
        """Take the classes that the modules have now for those that must not change."""
        self._modules = _module_checks(root, self._visited)

    # -- does it hold ------------------------------------------------------------------------------------------------

    def holds(self) -> bool:
        """Whether what the trace read is still so."""
        for owner, name, module, cls, had_hooks in self._modules:
            if owner.get(name) is not module or module.__class__ is not cls or hooked(module) is not had_hooks:
                return False
        for children, count in self._children:
            if len(children) != count:
                return False
        for module, name, check, expected in self._guards:
            value = getattr(module, name, _MISSING)
            if (value if check is None or value is _MISSING else check(value)) != expected:
                return False
        return self._read_rates()

    def _read_rates(self) -> bool:
        """Take up changed rates; False where one became another kind (off, zeros, not drawable)."""
        rates = tuple([getattr(owner, name) if owner is not None else name for owner, name in self._rate_sources])
        if rates == self._rates:
            return True
        sites = self.context.sites
        kinds = [_kind(rate, site, self._options) for rate, site in zip(rates, sites, strict=True)]
        if [k[0] for k in kinds] != [k[0] for k in self._kinds]:
            return False
        self._rates = rates
        self.draws = SiteDraws(self.context, [kind[1] for kind in kinds])
        return True

    # -- running -----------------------------------------------------------------------------------------------------

    def __call__(self, root: nn.Module, tensors: list[Tensor]) -> Any:
        """Run on the tensor leaves of the inputs."""
        draws = self.draws.draw()
        outputs = self._run(root, *tensors, *self._inputs(draws))
        outputs, rows = outputs[: self._results], outputs[self._results :]
        if runtime.frame is not None:
            self.draws.record(draws, rows)
        return self._packed(outputs)

    def _as_written(self, graph: fx.Graph) -> Callable[[nn.Module, list[Tensor]], Any]:
        run = _generate(graph)
        return lambda root, tensors: self._packed(run(root, *tensors))

    def _packed(self, outputs: Any) -> Any:
        return outputs[0] if self._out_spec is None else pytree.tree_unflatten(outputs, self._out_spec)

    def _inputs(self, draws: dict[int, Draw | TileDraw]) -> list[Any]:
        """The draws and live rates, in the order of insert_draws' placeholders."""
        inputs: list[Any] = []
        for index, site in enumerate(self.context.sites):
            if index in draws:
                inputs += [getattr(draws[index], field) for field in self._options.pattern.fields]
            elif site.takes_rate:
                inputs.append(self._rates[index])
        return inputs


_MISSING = object()


def _with_masks_recognised(root: nn.Module, graph: fx.Graph, options: Options) -> fx.Graph | None:
    """A copy in which masks made by hand are dropouts; None where there are none."""
    if not any(op_name(node) in BERNOULLI for node in graph.nodes):
        return None
    made = run_passes(root, copy_of(graph), AS_WRITTEN, Context(options, costs_of(torch.device("cpu"))))
    return made if any(node.target is shared_dropout for node in made.nodes) else None


def _transform(root: nn.Module, traced: Trace, prefix: str, options: Options) -> Context:
    devices = [n.meta["val"].device for n in traced.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    context = Context(options, costs_of(devices[0] if devices else torch.device("cpu")), prefix=prefix)
    traced.graph = run_passes(root, traced.graph, PIPELINE, context)
    return context


def _generate(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of (module, inputs...): parameters are read from the module at each call."""
    code = graph.python_code(root_module="self")
    name = f"<dropfx forward {next(_numbers)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(True), name)
    scope = dict(code.globals)
    exec(compile(code.src, name, "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function


def _module_checks(
    root: nn.Module, visited: dict[str, tuple[type, bool]]
) -> list[tuple[dict[str, Any], str, nn.Module, type, bool]]:
    checks = []
    for path, (_, had_hooks) in visited.items():
        if path:
            parent, _, name = path.rpartition(".")
            module = root.get_submodule(path)
            checks.append((root.get_submodule(parent)._modules, name, module, type(module), had_hooks))
    return checks


def _rate_source(root: nn.Module, site: Site) -> tuple[Any, Any]:
    return (None, site.rate) if site.live is None else (root.get_submodule(site.live[0]), site.live[1])


def _kind(rate: Any, site: Site, options: Options) -> tuple[str, Realisation | None]:
    """What must not change about a rate, and the pattern fitted to it where the site is rewritten."""
    if not isinstance(rate, (int, float)) or not 0 < rate < 1:
        return f"{rate!r}", None
    if not site.rewritten or site.realisation is None:
        return "drops", None
    try:
        fit = options.pattern.realise(site.realisation.units, rate, site.groups)
    except PatternRefused:
        return "not drawable", None
    return ("ragged" if fit.ragged else "drawn"), fit


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Size]:
    return [leaf.shape for leaf in pytree.tree_leaves(opened((args, kwargs))) if isinstance(leaf, Tensor)]
