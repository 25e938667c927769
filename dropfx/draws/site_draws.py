"""The draws of a rewritten graph: made for a call, and recorded as the multipliers that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropfx.draws.draw_plan import DrawPlan, draw_number
from dropfx.draws.runtime import Frame
from dropfx.graph.pass_infra import Context, Site, Within
from dropfx.ops.groups import by_row
from dropfx.ops.rows import positions
from dropfx.ops.triton_available import why_no_kernels
from dropfx.patterns import AnyDraw, Draw, Fit, Pattern, RowDraw, Tile, TileDraw

_BATCHES = 64
"""Sizes of batches for which plans of row sites are kept."""


class SiteDraws:
    """Draws for the rewritten sites of a graph, one plan for each device and pattern.

    Args:
        context: the graph's, after the passes.
        fits: the pattern fitted to each of context.sites at its present rate; None for sites that run as written.
    """

    def __init__(self, context: Context, fits: Sequence[Fit | None]) -> None:
        self._context = context
        self._for_compiler = not context.eager
        of_rows: list[int] = []
        by_kind: dict[tuple[torch.device, Pattern], list[int]] = {}
        for index, site in enumerate(context.sites):
            if site.rewritten and site.by_rows:
                of_rows.append(index)
            elif site.rewritten and site.pattern is not None:
                by_kind.setdefault((site.device, site.pattern), []).append(index)
        self._units = [self._plan(indices, fits) for indices in by_kind.values()]
        self._of_rows, self._fits = of_rows, fits
        self._rows: dict[tuple[int, ...], list[_Planned]] = {}

    def _plan(self, indices: list[int], fits: Sequence[Fit | None]) -> _Planned:
        sites = [self._context.sites[index] for index in indices]
        device, pattern = sites[0].device, sites[0].pattern
        assert pattern is not None
        chosen = [fit for index in indices if (fit := fits[index]) is not None]
        by_kernel = self._context.options.lowering != "aten" and not why_no_kernels(device)
        return indices, DrawPlan([site.name for site in sites], chosen, pattern, device, by_kernel)

    def _planned(self, inputs: Sequence[Any] | None) -> list[_Planned]:
        """The plans of a call: those of row sites are for the size of its batch."""
        if not self._of_rows:
            return self._units
        sizes = tuple(_batch(self._context.sites[index], inputs) for index in self._of_rows)
        if sizes not in self._rows:
            if len(self._rows) >= _BATCHES:
                self._rows.clear()
            self._rows[sizes] = self._plan_rows(sizes)
        return [*self._rows[sizes], *self._units]

    def _plan_rows(self, sizes: tuple[int, ...]) -> list[_Planned]:
        fits = list(self._fits)
        by_device: dict[torch.device, list[int]] = {}
        for index, size in zip(self._of_rows, sizes, strict=True):
            site = self._context.sites[index]
            assert site.pattern is not None
            fits[index] = site.pattern.fit(size, site.rate)
            by_device.setdefault(site.device, []).append(index)
        return [self._plan(indices, fits) for indices in by_device.values()]

    def draw(self, inputs: Sequence[Any] | None = None) -> dict[int, AnyDraw]:
        """Fresh draws, by the numbers of their sites.

        Args:
            inputs: of the call, whose batches the row sites' draws are for; None: as large as in the trace.
        """
        numbers: dict[torch.device, Tensor] = {}
        draws: dict[int, AnyDraw] = {}
        for indices, plan in self._planned(inputs):
            if plan.source not in numbers:
                numbers[plan.source] = draw_number(plan.source)
            draws.update(zip(indices, plan.draw(numbers[plan.source]), strict=True))
        if self._for_compiler:
            return {index: _for_compiler(draw, self._context.sites[index]) for index, draw in draws.items()}
        return draws

    def record(self, frame: Frame, draws: dict[int, AnyDraw], rows: Sequence[int]) -> None:
        """Note the multipliers; `rows` has the length of each site's leading axis where there are groups."""
        lengths = dict(zip(grouped(self._context), rows, strict=False))
        for index, draw in draws.items():
            site = self._context.sites[index]
            if isinstance(draw, TileDraw):
                self._record_tiles(frame, site, draw)
            elif isinstance(draw, RowDraw):
                shape = [1] * site.rank
                shape[site.axis] = -1
                frame.note(site.call, draw.mask(site.dtype).view(shape) * site.mask_value)
            else:
                length = lengths.get(index)
                mask = _multiplier(site, draw, length)
                if site.within is not None and length is not None:
                    mask = _of_all_rows(mask, site.within, draws)
                frame.note(site.call, mask)

    def _record_tiles(self, frame: Frame, site: Site, draw: TileDraw) -> None:
        pattern = self._context.options.pattern
        assert isinstance(pattern, Tile)
        for number, weight in enumerate(site.weights):
            suffix = f"[{number}]" if len(site.weights) > 1 else ""
            frame.note(site.call, draw.mask(*weight, pattern.shape, site.dtype).to(site.device), suffix)


_Planned = tuple[list[int], DrawPlan]


def _batch(site: Site, inputs: Sequence[Any] | None) -> int:
    """The number of samples of a call."""
    if inputs is None or site.batch is None:
        return site.leading
    place, dim = site.batch
    return int(inputs[place]) if dim is None else int(inputs[place].size(dim))


def _for_compiler(draw: AnyDraw, site: Site) -> AnyDraw:
    """What changes from draw to draw as tensors: a compiler would take it for constants."""
    if isinstance(draw, RowDraw):
        return draw._replace(scale=torch.tensor(draw.scale, dtype=site.dtype, device=site.device))
    # it may vary the number of runs, not their length
    varies = isinstance(draw, Draw) and site.pattern is not None and site.pattern.on_host
    return draw.by_unit() if isinstance(draw, Draw) and varies else draw


def _multiplier(site: Site, draw: Draw, length: int | None) -> Tensor:
    """The draw's mask, with axes of length 1 so that it broadcasts to the site's tensor."""
    mask, behind = draw.mask(site.dtype), [1] * (-1 - site.axis)
    if length is None:
        return mask.view(-1, *behind)
    between = [1] * (site.rank - 2 - len(behind))
    leading = [*between, length] if site.steps_second else [length, *between]
    return by_row(mask, length).view(*leading, mask.size(-1), *behind)


def _of_all_rows(mask: Tensor, within: Within, draws: dict[int, AnyDraw]) -> Tensor:
    """The mask of kept rows as one of all, where they lie on the first axis, along which masks differ."""
    rows = draws[within.site]
    assert isinstance(rows, RowDraw)
    kept = positions(rows.rows, within.factor)
    if within.dim != 0:
        return mask
    whole = mask.new_zeros(rows.fit.units * within.factor, *mask.shape[1:])
    return whole.index_copy_(0, kept, mask)


def fields_of(context: Context, index: int) -> tuple[str, ...]:
    """What the draw of a rewritten site is to the graph."""
    pattern = context.sites[index].pattern
    assert pattern is not None
    return pattern.fields


def grouped(context: Context) -> list[int]:
    """Numbers of the rewritten sites with several draws, of whose leading axes the graph returns the lengths."""
    return [index for index in context.draws if context.sites[index].groups > 1]
