"""One graph that Dynamo captured, and what runs in its place: rewritten for the rates of a call, with fresh draws."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import active_fake_mode

from dropfx.draws.runtime import runtime, shared
from dropfx.draws.site_draws import SiteDraws
from dropfx.errors import PassError
from dropfx.frontend.checkpoints import runnable, walk
from dropfx.frontend.dynamo_graph import Lengths, Live, lengths_of_inputs, results_of
from dropfx.frontend.naming import Naming
from dropfx.frontend.rates import Rates
from dropfx.frontend.rewrite_captured import Asked, Part, rewrite_captured, take_back_guards
from dropfx.frontend.whole_calls import unfold
from dropfx.graph.pass_infra import Site
from dropfx.options import Options
from dropfx.passes import AS_WRITTEN
from dropfx.patterns import Fit, PatternRefused

_numbers = itertools.count()
Runs = Callable[..., Sequence[Any]]
_VARIANTS = 4
"""Kept for a graph, one for each combination of rates that are off, on and all; the least recently used goes first."""


class CapturedGraph:
    """A captured graph.

    Args:
        module: Dynamo's; its dropouts get their own names back.
        example_inputs: as Dynamo hands them over.
        options: the user's.
        compile_inner: what the rewritten graph goes on to; None runs it as Python code.
        paths, root: as in `Naming`.

    Attributes:
        failed: why a pass failed, "" where none did.
        number: of the graphs that this process has captured.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Options,
        compile_inner: Callable[..., Runs] | None,
        paths: dict[int, str] | None = None,
        root: str = "",
    ) -> None:
        self.failed, self.number = "", next(_numbers)
        for part in _parts(module):
            unfold(part.graph)
            part.recompile()
        self._module, self._examples, self._options = module, list(example_inputs), options
        self._compile_inner = compile_inner
        self._naming = Naming([node for node, _ in walk(module)], paths, root)
        self._rates = Rates(module)
        self._lengths = lengths_of_inputs(module.graph)
        self._results = len(results_of(module.graph))
        self._disabled: Runs | None = None
        self._plain = None if self._naming.drops else self._run(module)
        self.variants: list[Variant] = [] if self._plain else [self._rewrite(self._rates.hints())]

    @property
    def drops(self) -> bool:
        """Whether anything in it drops, or may be a mask."""
        return self._naming.drops

    @property
    def rewritten(self) -> bool:
        """Whether it draws, for any rates."""
        return any(variant.drops for variant in self.variants)

    @property
    def calls(self) -> Counter[str]:
        """How often the graph calls what drops in it."""
        return self._naming.calls

    def __call__(self, *args: Any) -> Sequence[Any]:
        """One call: draws, then the rewritten graph; as written where dropfx is disabled."""
        if self._plain is not None:
            return self._plain(*args)
        if shared.disabled:
            with runtime.keeping_all():
                return self._as_written(*args)
        variant = self._variant(self._rates(args))
        if active_fake_mode() is not None:
            # DDP's graphs are cut at its buckets: Dynamo asks one part for the kinds of the next one's inputs
            return variant.run(*args, *variant.examples)[: self._results]
        with runtime.outermost() if variant.drops else contextlib.nullcontext():
            drawn = variant.draw(args)
            outputs = variant.run(*args, *variant.inputs(drawn))
            if runtime.frame is not None:
                variant.record(drawn, outputs[self._results :])
                runtime.frame.calls.update(self.calls)
        return outputs[: self._results]

    def _variant(self, rates: tuple[float, ...]) -> Variant:
        for place, variant in enumerate(self.variants):
            if variant.take_up(rates):
                if place:
                    self.variants.insert(0, self.variants.pop(place))
                return variant
        self.variants.insert(0, self._rewrite(rates))
        del self.variants[_VARIANTS:]
        return self.variants[0]

    def _rewrite(self, rates: tuple[float, ...]) -> Variant:
        made = self._try(rates, self._lengths)
        if made is None and self._lengths:  # for a batch of one size a compiler knows how many rows there can be
            made = self._try(rates, {})
        if made is not None:
            return made
        self._give_up("a compiler took for granted how many units are kept, which changes from draw to draw")
        return Variant([], rates, self._options, self._run(self._module), [])

    def _try(self, rates: tuple[float, ...], lengths: Lengths) -> Variant | None:
        """The graph for some rates; None where a compiler fixed what draws keep."""
        places = self._rates.places
        live: Live = {n: (rates[at], at) for n, at in places.items() if at is not None}
        unknown = {node for node in self._naming.sites if node not in places}
        live = {**live, **dict.fromkeys(unknown, (None, None))}
        asked = Asked(self._options, self._naming, live, self._compile_inner is None, lengths=lengths)
        try:
            made, parts = rewrite_captured(self._module, asked)
        except PassError as error:
            self._give_up(str(error))
            made, parts = self._module, []
        drawn = any(part.context.draws for part in parts)
        shared.rewritten += drawn
        if not drawn and not (self._naming.recurrent and self._compile_inner):  # no compiler takes these as written
            made = self._module
        examples = [example for part in parts for example in part.examples]
        run = self._run(made, examples)
        return None if take_back_guards(examples) else Variant(parts, rates, self._options, run, examples)

    def _give_up(self, why: str) -> None:
        self.failed = why
        warnings.warn(f"dropfx: {why}; the graph runs as written", RuntimeWarning, stacklevel=3)

    def _as_written(self, *args: Any) -> Sequence[Any]:
        """As the model has it; masks made by hand, which `disabled` turns off, are dropouts in it."""
        if self._disabled is None:
            made = self._module
            if self._naming.bernoulli:
                made, _ = rewrite_captured(made, Asked(self._options, self._naming, {}, True, AS_WRITTEN))
            self._disabled = runnable(made).forward
        return tuple(self._disabled(*args))

    def _run(self, module: fx.GraphModule, draws: Sequence[Any] = ()) -> Runs:
        if self._compile_inner is not None:
            return self._compile_inner(module, [*self._examples, *draws])
        forward = runnable(module).forward

        def run(*args: Any) -> Sequence[Any]:
            """As compiled code runs: what intercepts torch's functions was followed when the graph was captured."""
            with torch._C.DisableTorchFunction():
                return forward(*args)  # type: ignore[no-any-return]

        return run


def _parts(module: fx.GraphModule) -> list[fx.GraphModule]:
    return [part for part in module.modules() if isinstance(part, fx.GraphModule)]


class Variant:
    """A graph rewritten for some rates, and for others of the same kinds.

    Attributes:
        contexts: of its parts.
        run: (inputs of the captured graph, draws) -> its results, then lengths of leading axes.
        examples: of the draws.
        drops: there are draws.
    """

    def __init__(
        self, parts: list[Part], rates: tuple[float, ...], options: Options, run: Runs, examples: list[Any]
    ) -> None:
        self.contexts = [part.context for part in parts]
        self.run, self.examples = run, examples
        self.drops = any(context.draws for context in self.contexts)
        self._inputs = [(number, *place) for number, part in enumerate(parts) for place in part.inputs]
        self._rows = [part.rows for part in parts]
        self._options, self._rates = options, rates
        self._kinds = [[_kind(_rate(site, rates), site, options) for site in c.sites] for c in self.contexts]
        self._draws = [SiteDraws(c, [fit for _, fit in k]) for c, k in zip(self.contexts, self._kinds, strict=True)]

    def take_up(self, rates: tuple[float, ...]) -> bool:
        """Go on with changed rates; False where one became of another kind: off, all, or not drawable."""
        if rates == self._rates:
            return True
        kinds = [[_kind(_rate(site, rates), site, self._options) for site in c.sites] for c in self.contexts]
        if [[kind for kind, _ in k] for k in kinds] != [[kind for kind, _ in k] for k in self._kinds]:
            return False
        self._rates = rates
        self._draws = [SiteDraws(c, [fit for _, fit in k]) for c, k in zip(self.contexts, kinds, strict=True)]
        return True

    def draw(self, args: Sequence[Any] | None = None) -> list[dict[int, Any]]:
        """Fresh draws of all parts, for a call of the graph on `args`; None: for a batch as large as the traced one."""
        return [draws.draw(args) for draws in self._draws]

    def inputs(self, drawn: list[dict[int, Any]]) -> list[Any]:
        """What of the draws enters the graph."""
        return [getattr(drawn[part][site], field) for part, site, field in self._inputs]

    def record(self, drawn: list[dict[int, Any]], rows: Sequence[Any]) -> None:
        """Note the multipliers; `rows` are lengths of leading axes, or tensors that have them."""
        assert runtime.frame is not None
        lengths = [row.size(0) if isinstance(row, torch.Tensor) else int(row) for row in rows]
        for draws, count, made in zip(self._draws, self._rows, drawn, strict=True):
            draws.record(runtime.frame, made, lengths[:count])
            lengths = lengths[count:]


def _rate(site: Site, rates: tuple[float, ...]) -> float:
    return site.rate if site.live is None else rates[site.live]


def _kind(rate: float, site: Site, options: Options) -> tuple[str, Fit | None]:
    """What must not change about a rate, and the pattern fitted to it where the site is rewritten."""
    if not 0 < rate < 1:
        return f"{rate!r}", None
    if not site.rewritten or site.fit is None:
        return "drops", None
    try:
        fit = (site.pattern or options.pattern).fit(site.fit.units, rate, site.groups)
    except PatternRefused:
        return "not drawable", None
    return ("ragged" if fit.ragged else "drawn"), fit
