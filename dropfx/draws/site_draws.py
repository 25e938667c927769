"""The draws of a rewritten graph: made for a call, and recorded as the multipliers that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dropfx.draws.draw_plan import DrawPlan
from dropfx.draws.runtime import Frame
from dropfx.graph.pass_infra import Context, Site
from dropfx.ops.groups import by_row
from dropfx.ops.triton_available import why_no_kernels
from dropfx.patterns import Draw, Fit, Tile, TileDraw


class SiteDraws:
    """Draws for the rewritten sites of a graph, one plan a device.

    Args:
        context: the graph's, after the passes.
        fits: the pattern fitted to each of context.sites at its present rate; None for sites that run as written.
    """

    def __init__(self, context: Context, fits: Sequence[Fit | None]) -> None:
        self._context = context
        # a compiler would take a varying length of a run for a constant; it may vary the number of runs
        self._vary = context.options.pattern.on_host and not context.eager
        by_device: dict[torch.device, list[int]] = {}
        for index, site in enumerate(context.sites):
            if site.rewritten:
                by_device.setdefault(site.device, []).append(index)
        self._plans = []
        for device, indices in by_device.items():
            names = [context.sites[i].name for i in indices]
            chosen = [fit for i in indices if (fit := fits[i]) is not None]
            by_kernel = context.options.lowering != "aten" and not why_no_kernels(device)
            self._plans.append((indices, DrawPlan(names, chosen, context.options.pattern, device, by_kernel)))

    def draw(self) -> dict[int, Draw | TileDraw]:
        """Fresh draws, by the numbers of their sites."""
        draws = {
            index: draw
            for indices, plan in self._plans
            for index, draw in zip(indices, plan.draw(plan.draw_number()), strict=True)
        }
        if self._vary:
            return {index: draw.by_unit() if isinstance(draw, Draw) else draw for index, draw in draws.items()}
        return draws

    def record(self, frame: Frame, draws: dict[int, Draw | TileDraw], rows: Sequence[int]) -> None:
        """Note the multipliers; `rows` has the length of each site's leading axis where there are groups."""
        lengths = dict(zip(grouped(self._context), rows, strict=False))
        for index, draw in draws.items():
            site = self._context.sites[index]
            if isinstance(draw, TileDraw):
                self._record_tiles(frame, site, draw)
            else:
                frame.note(site.call, _multiplier(site, draw, lengths.get(index)))

    def _record_tiles(self, frame: Frame, site: Site, draw: TileDraw) -> None:
        pattern = self._context.options.pattern
        assert isinstance(pattern, Tile)
        for number, weight in enumerate(site.weights):
            suffix = f"[{number}]" if len(site.weights) > 1 else ""
            frame.note(site.call, draw.mask(*weight, pattern.shape, site.dtype).to(site.device), suffix)


def _multiplier(site: Site, draw: Draw, length: int | None) -> Tensor:
    """The draw's mask, with axes of length 1 so that it broadcasts to the site's tensor."""
    mask, behind = draw.mask(site.dtype), [1] * (-1 - site.axis)
    if length is None:
        return mask.view(-1, *behind)
    between = [1] * (site.rank - 2 - len(behind))
    leading = [*between, length] if site.steps_second else [length, *between]
    return by_row(mask, length).view(*leading, mask.size(-1), *behind)


def grouped(context: Context) -> list[int]:
    """Numbers of the rewritten sites with several draws, of whose leading axes the graph returns the lengths."""
    return [index for index in context.draws if context.sites[index].groups > 1]
