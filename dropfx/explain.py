"""What dropfx.compile rewrites in a model, and why the rest runs as written."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dropfx.draws.runtime import numbers_of_their_own
from dropfx.errors import DropfxError, InvalidInput, InvalidOption
from dropfx.frontend.compile import check_inputs, check_model, has_forward
from dropfx.frontend.compiled_module import State
from dropfx.frontend.dtensor import TENSOR_PARALLEL, tensor_parallel
from dropfx.frontend.swapped_class import swap
from dropfx.frontend.trial import copy_inputs, generators_kept, training_copy
from dropfx.graph.pass_infra import Site
from dropfx.options import Options, make_options


@dataclass(frozen=True)
class SiteReport:
    """One dropout of the training graph.

    Attributes:
        name: path of the module; `path#2` is its second call, `path:dropout_1` the first functional dropout of its
            forward (docs/how_it_works.md, 3).
        rate: the p that the model asks for.
        drawn_rate: the exact probability with which the pattern drops a unit (`rate` where the site runs as written).
        pattern: name of the pattern, "bernoulli" where the site runs as written.
        rewritten: whether it is rewritten.
        reason: why it runs as written, "" if it is rewritten.
        flops_dense, flops_compact: FLOPs of the matrix products around it, forward and backward, as written and with
            kept units only.
        predicted_speedup: of the region around it, by the device's cost table.
        seconds_saved: its share of what the model's step is predicted to gain; of a product between two sites each has
            a half.
        draws: draws of a call, each for a chunk of the rows; 0 where the site runs as written, in which every row has
            a mask of its own.
    """

    name: str
    rate: float
    drawn_rate: float
    pattern: str
    rewritten: bool
    reason: str
    flops_dense: int
    flops_compact: int
    predicted_speedup: float
    draws: int = 1
    seconds_saved: float = 0.0


@dataclass(frozen=True)
class Report:
    """What `explain` found: a row per site, and totals over all Linears of the model.

    Attributes:
        sites: in the order of the forward.
        flops_dense, flops_compact: FLOPs of the model's Linears, forward and backward.
        opaque: path of a module whose forward runs as written, wholly or in part -> why.
        lowerings: gathered op and its sites -> what executes it, and why; empty where there was no choice.
        seconds_written, seconds_planned: predicted for forward and backward of the captured graphs, as written and as
            rewritten, by the device's cost table; the loss and the optimizer are not in them.
    """

    sites: list[SiteReport]
    flops_dense: int
    flops_compact: int
    opaque: dict[str, str] = field(default_factory=dict)
    lowerings: dict[str, str] = field(default_factory=dict)
    seconds_written: float = 0.0
    seconds_planned: float = 0.0

    @property
    def predicted_speedup(self) -> float:
        """Of forward and backward of all captured graphs, by the device's cost table."""
        return self.seconds_written / self.seconds_planned if self.seconds_planned else 1.0

    @property
    def flop_ratio(self) -> float:
        """Dense over compact FLOPs: the ceiling of the speed-up."""
        return self.flops_dense / self.flops_compact if self.flops_compact else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return {**asdict(self), "flop_ratio": self.flop_ratio}

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=160).print(self._table())
        rewritten = sum(site.rewritten for site in self.sites)
        lines = [f"{rewritten} of {len(self.sites)} dropouts rewritten"]
        if self.flops_compact:
            lines.append(
                f"FLOPs of layers and recurrences per training step: {self.flops_dense:.3g} -> "
                f"{self.flops_compact:.3g} ({self.flop_ratio:.2f}x)"
            )
        if rewritten:
            lines.append(
                f"predicted step, forward and backward: {1e3 * self.seconds_written:.3g} -> "
                f"{1e3 * self.seconds_planned:.3g} ms ({self.predicted_speedup:.2f}x)"
            )
        lines += [f"{operation}: {choice}" for operation, choice in self.lowerings.items()]
        lines += [
            f"{f'module {path!r}' if path else 'the model'} runs as written, wholly or in part: {reason}"
            for path, reason in self.opaque.items()
        ]
        return out.getvalue() + "\n".join(lines)

    def _table(self) -> Table:
        table = Table(
            "site",
            "rate",
            "drawn\nrate",
            "pattern",
            "draws",
            "FLOPs",
            "compact\nFLOPs",
            "saved of\nthe step",
            "reason",
        )
        for site in self.sites:
            known = (f"{site.flops_dense:.2e}", f"{site.flops_compact:.2e}", f"{1e3 * site.seconds_saved:.3g} ms")
            table.add_row(
                site.name,
                f"{site.rate:g}",
                f"{site.drawn_rate:.4g}",
                site.pattern,
                str(site.draws or ""),
                *(known if site.rewritten else ("", "", "")),
                site.reason,
            )
        return table

    def plot(self, path: str | Path) -> None:
        """Write a bar chart of dense and compact FLOPs per site to `path` (needs the `plot` extra).

        Raises:
            DropfxError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise DropfxError("plot: matplotlib is missing, install dropfx[plot]") from error
        figure = Figure(figsize=(8, 1.5 + 0.4 * len(self.sites)), layout="constrained")
        axes = figure.subplots()
        rows = range(len(self.sites))
        axes.barh(rows, [s.flops_dense for s in self.sites], color="lightgrey", label="as written")
        axes.barh(rows, [s.flops_compact for s in self.sites], height=0.5, color="tab:blue", label="compact")
        axes.set_yticks(rows, [s.name for s in self.sites])
        axes.invert_yaxis()
        axes.set_xlabel("FLOPs of the Linears around the site, forward + backward")
        axes.legend()
        figure.savefig(path)


def explain(
    model: nn.Module, *inputs: Any, options: dict[str, Any] | None = None, kwargs: dict[str, Any] | None = None
) -> Report:
    """Say for each dropout of `model` whether `dropfx.compile` rewrites it, and if it does not, why.

    Runs one training forward of a copy that shares the parameters, whatever the `training` flags of the model are. The
    model, its flags, its buffers and the random generators do not change.

    Args:
        model: any module, compiled or not.
        inputs: inputs of one training call.
        options: options of `dropfx.compile`; those of a compiled model are the default.
        kwargs: keyword inputs of that call.

    Raises:
        InvalidModel (TypeError), InvalidOption (ValueError), InvalidInput (ValueError): as `dropfx.compile` does.
    """
    check_model(model)
    checked = options_for(model, options)
    check_inputs(model, inputs, kwargs or {})
    if tensor_parallel(model, (inputs, kwargs)):  # all of it runs as written: there is nothing to try
        opaque = {"": TENSOR_PARALLEL}
        return Report(_unreached(model, opaque), 0, 0, opaque)
    trial = training_copy(model)
    swap(trial, state := State(checked, quiet=True))
    if not has_forward(model):
        state.adopt_parts(trial)
    args, named = copy_inputs((inputs, kwargs or {}))
    with torch.inference_mode(False), torch.enable_grad(), generators_kept(), numbers_of_their_own():
        try:
            trial(*args, **named)
        except DropfxError:
            raise
        except Exception as error:
            message = f"inputs: {type(model).__name__}.forward fails on them: {error}"
            raise InvalidInput(message) from error
    return _report(trial)


def options_for(model: nn.Module, options: dict[str, Any] | None) -> Options:
    """The given options, checked; without any, those that the model was compiled with, or the defaults."""
    if options is not None and not isinstance(options, dict):
        raise InvalidOption(f"options: got {type(options).__name__}, accepted is a dict of dropfx.compile's options")
    state = model.__dict__.get("_dropfx")
    if options is None and state is not None:
        checked: Options = state.options
        return checked
    return make_options(**(options or {}))


def _report(trial: nn.Module) -> Report:
    sites: list[SiteReport] = []
    opaque: dict[str, str] = {}
    lowerings: dict[str, str] = {}
    dense = compact = 0
    seconds = [0.0, 0.0]
    captures = [s.capture for m in trial.modules() if (s := m.__dict__.get("_dropfx")) is not None and s.capture]
    for capture in captures:
        opaque.update(capture.left)
    before: Counter[str] = Counter()
    for graph in sorted((graph for capture in captures for graph in capture.graphs), key=lambda graph: graph.number):
        for context in (c for variant in graph.variants for c in variant.contexts):
            sites += [_row(site, site.call.behind(before).name) for site in context.sites]
            dense, compact = dense + context.flops_dense, compact + context.flops_compact
            seconds = [seconds[0] + context.seconds_written, seconds[1] + context.seconds_planned]
            lowerings.update(context.lowerings)
        before.update(graph.calls)
    listed = {site.name for site in sites}
    sites += [row for row in _unreached(trial, opaque) if row.name not in listed]
    return Report(sites, dense, compact, opaque, lowerings, *seconds)


def _row(site: Site, name: str) -> SiteReport:
    drawn = site.rate
    if site.rewritten and site.fit is not None:
        drawn = site.fit.drawn_rate
    return SiteReport(
        name=name,
        rate=site.rate,
        drawn_rate=drawn,
        pattern=site.pattern.name if site.rewritten and site.pattern is not None else "bernoulli",
        rewritten=site.rewritten,
        reason=site.reason,
        flops_dense=site.flops_dense,
        flops_compact=site.flops_compact,
        predicted_speedup=site.predicted_speedup if site.rewritten else 1.0,
        draws=site.groups if site.rewritten else 0,
        seconds_saved=site.seconds_saved,
    )


def _unreached(trial: nn.Module, opaque: dict[str, str]) -> list[SiteReport]:
    """Dropout modules that belong to a forward which runs as written."""
    rows = []
    for path, module in trial.named_modules():
        if not isinstance(module, nn.modules.dropout._DropoutNd):
            continue
        above = [p for p in opaque if p == "" or path == p or path.startswith(p + ".")]
        if above:
            reason = f"the forward around it runs as written: {opaque[max(above, key=len)]}"
            rows.append(SiteReport(path, module.p, module.p, "bernoulli", False, reason, 0, 0, 1.0, 0))
    return rows
