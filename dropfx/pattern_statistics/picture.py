"""`dropfx patterns`: all patterns side by side with independent dropout, as a table and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from dropfx.errors import DropfxError, InvalidOption
from dropfx.pattern_statistics.exact import grid, place_weights
from dropfx.pattern_statistics.report import Statistics, statistics, table
from dropfx.pattern_statistics.sampled import masks
from dropfx.patterns import BY_NAME, Tile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEPS, _NEAR, _BINS = 64, 64, 50
"""Draws in a strip, units in the enlarged strip, bins of the kept share."""
_COLOR = "#2a6f97"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--rate", type=float, default=0.5, help="drop probability (default: 0.5)")
    parser.add_argument(
        "--units", type=int, default=2048, help="length of the axis, or side of the tiled weight (default: 2048)"
    )
    parser.add_argument("--groups", type=int, default=1, help="draws per batch (default: 1)")
    parser.add_argument(
        "--samples", type=int, default=4096, help="draws from which figures are sampled (default: 4096)"
    )
    parser.add_argument(
        "--pattern", nargs="+", choices=BY_NAME, default=list(BY_NAME), help="patterns to compare (default: all)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="write a picture (needs matplotlib)")


def main(args: argparse.Namespace) -> int:
    """Print the table, one line for each pattern that cannot serve the axis, and write the picture."""
    results = [statistics("bernoulli", args.rate, args.units, args.groups, args.samples)]
    refused = []
    for name in args.pattern:
        try:
            results.append(statistics(name, args.rate, args.units, args.groups, args.samples))
        except InvalidOption as error:
            refused.append(str(error))
    if len(results) == 1:
        raise InvalidOption("; ".join(refused))
    console = Console(width=160, highlight=False)
    console.print(table(results))
    console.print("~ by sampling; all other figures are exact", *refused, sep="\n")
    if args.out:
        picture(results, args.out)
        console.print(f"picture: {args.out}")
    return 0


def picture(results: Sequence[Statistics], path: str | Path) -> None:
    """Write a row of panels for each pattern: its draws, the first units enlarged, correlations, kept shares.

    Raises:
        DropfxError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DropfxError("plot: matplotlib is missing, install dropfx[plot]") from error
    figure = Figure(figsize=(16, 2.4 * len(results) + 0.6), layout="constrained")
    panels = figure.subplots(len(results), 4, squeeze=False, width_ratios=(1.6, 1, 1, 1))
    for row, result in zip(panels, results, strict=True):
        _draws(row[0], row[1], result)
        _correlations(row[2], result)
        _shares(row[3], result)
    titles = (
        f"{_STEPS} successive draws, kept is dark",
        "the first units",
        "pair correlation by distance",
        "kept share",
    )
    for axis, title in zip(panels[0], titles, strict=True):
        axis.set_title(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _draws(whole: Axes, near: Axes, result: Statistics) -> None:
    """Strips of the first group's draws, a row each; of tiles those of the first row, and the grid of one draw."""
    pattern, units = result.source, result.units
    rows, columns = grid(pattern, units) if isinstance(pattern, Tile) else (0, units)
    fit = pattern.fit(max(rows, columns), result.rate, result.groups)
    kept = torch.stack([mask[0] for mask in masks(pattern, fit, len(place_weights(pattern, units)), _STEPS)]) > 0
    whole.imshow(kept[:, :columns].numpy(), cmap="Greys", aspect="auto", interpolation="antialiased")
    whole.set_ylabel(result.pattern)
    shown = kept[:, :_NEAR]
    if rows:
        one = kept[int((~kept).any(1).to(torch.uint8).argmax())]  # the first draw that drops anything
        shown = one[(torch.arange(rows)[:, None] + torch.arange(columns))[:_NEAR, :_NEAR]]
    near.imshow(shown.numpy(), cmap="Greys", aspect="auto", interpolation="nearest")
    whole.set_xlabel("tile of the first row of tiles" if rows else "unit")
    near.set_xlabel("tiles of one draw" if rows else "unit")
    for axis in (whole, near):
        axis.set_yticks([])


def _correlations(axis: Axes, result: Statistics) -> None:
    distances = range(1, len(result.pair_correlations) + 1)
    axis.plot(distances, result.pair_correlations, ".", markersize=3, color=_COLOR)
    axis.axhline(result.pair_mean, color="#d1495b", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_ylim(-1.1, 1.1)
    what = "tiles apart along a row" if result.source.drops_weights else "units apart"
    axis.set_xlabel(f"{what}; mean of all pairs {result.pair_mean:+.4f}")


def _shares(axis: Axes, result: Statistics) -> None:
    axis.hist(result.shares, bins=_BINS, range=(0, 1), weights=result.share_probabilities, color=_COLOR)
    axis.set_ylim(0, 1.05)
    axis.set_xlabel(f"sd {result.kept_share_sd:.4f}")
    axis.set_ylabel("probability")
