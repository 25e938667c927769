"""What a pass is, and how a pipeline of them runs (after onnx_ir's pass infrastructure).

A pass is a function `name(graph_module, context) -> PassResult`; its file has its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from dropfx.errors import PassError
from dropfx.graph.device_costs import DeviceCosts
from dropfx.graph.dropout_ops import Call
from dropfx.graph.nodes import clean_up
from dropfx.options import Options
from dropfx.patterns import Fit, Pattern


@dataclass
class Site:
    """One dropout of the graph.

    Attributes:
        call: which dropout, and the number of its call.
        rate: the `p` that the model asks for, as it was when the graph was rewritten.
        live: number of the rate among those that a call brings along; None for a constant.
        node: the dropout's node; None for one that the graph does not show (inside nn.LSTM, say).
        axis: its unit axis, counted from the end.
        rank, leading: dimensions of its tensor, and the length of the first one in the trace.
        groups: draws per call.
        steps_second: the groups are steps, which lie on the tensor's second axis as the model has it.
        weights: shapes of the weights that drop tiles for it.
        by_rows: it drops whole samples of a branch; its axis is that of the samples, `leading` their number.
        batch: where a call has the number of samples: an input of the graph, and an axis of it where that is a tensor;
            None: it never changes.
        within: the row site on whose kept rows it is, their axis and the positions of each; None for all rows.
        mask_value: of a row site's mask for a kept row.
        kept: what a row site multiplies kept rows by, with the numbers around its mask.
        pattern: that it is drawn by; None until one is chosen.
        fit: the pattern fitted to the axis, None where it does not fit.
        reason: why the site runs as written, "" where it is rewritten.
    """

    call: Call
    rate: float
    live: int | None = None
    node: fx.Node | None = None
    axis: int = -1
    rank: int = 0
    leading: int = 0
    groups: int = 1
    steps_second: bool = False
    weights: list[tuple[int, int]] = field(default_factory=list)
    by_rows: bool = False
    batch: tuple[int, int | None] | None = None
    within: Within | None = None
    mask_value: float = 1.0
    kept: float = 1.0
    pattern: Pattern | None = None
    fit: Fit | None = None
    reason: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    flops_dense: int = 0
    flops_compact: int = 0
    predicted_speedup: float = 1.0
    seconds_saved: float = 0.0

    @property
    def name(self) -> str:
        """As in `record` and `explain`."""
        return self.call.name

    @property
    def rewritten(self) -> bool:
        """Whether dropfx draws it: it is in the graph and nothing speaks against it."""
        return self.node is not None and not self.reason


class Within(NamedTuple):
    """A site inside of a row site's branch: the number of that, the rows' axis (from the front), positions of each."""

    site: int
    dim: int
    factor: int


@dataclass
class Context:
    """What passes share besides the graph.

    Attributes:
        options: the user's.
        costs: the device's.
        eager: the graph runs as plain Python, not through a further compiler.
        knows_batches: its caller can tell how many samples a call has, before the graph runs.
        sites: filled by find_sites, decided by plan_regions.
        draws: site index -> placeholder nodes, filled by insert_draws.
        lowerings: gathered op and its sites -> lowering and why, where there was a choice; filled by lower.
        time_axis: of the recurrent layers' inputs: 0, or 1 where the batch is first; None without any.
        flops_dense, flops_compact: of the Linears' and recurrent products, forward and backward.
        seconds_written, seconds_planned: of forward and backward, by the device's cost table.
    """

    options: Options
    costs: DeviceCosts
    eager: bool = True
    knows_batches: bool = True
    sites: list[Site] = field(default_factory=list)
    draws: dict[int, dict[str, fx.Node]] = field(default_factory=dict)
    lowerings: dict[str, str] = field(default_factory=dict)
    time_axis: int | None = None
    flops_dense: int = 0
    flops_compact: int = 0
    seconds_written: float = 0.0
    seconds_planned: float = 0.0

    def scalar_scales(self) -> set[fx.Node]:
        """Those inputs of draws that scale all kept units alike: not those of ragged blocks, a vector."""
        return {
            draw["scale"]
            for index, draw in self.draws.items()
            if (fit := self.sites[index].fit) is not None and not fit.ragged
        }


class PassResult(NamedTuple):
    """The graph module a pass returns, and whether it changed it."""

    graph_module: fx.GraphModule
    modified: bool


Pass = Callable[[fx.GraphModule, Context], PassResult]


def checking() -> bool:
    """Whether passes check what holds between them, which takes time: DROPFX_CHECK=1, as in the tests."""
    return os.environ.get("DROPFX_CHECK") == "1"


def run_passes(root: nn.Module | dict[str, Any], graph: fx.Graph, passes: Sequence[Pass], context: Context) -> fx.Graph:
    """Run the passes in order over `graph`.

    Raises:
        PassError: a pass raised; names it and those that ran before it.
    """
    module = fx.GraphModule(root, graph)
    done: list[str] = []
    for step in passes:
        name = getattr(step, "__name__", repr(step))
        try:
            module, modified = step(module, context)
            if modified:
                clean_up(module.graph)
        except Exception as error:
            raise PassError(f"pass {name!r} failed after {', '.join(done) or 'no other'}: {error}") from error
        done.append(name)
    return module.graph
