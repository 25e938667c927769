"""`dropfx.statistics`: how far a pattern's draws are from independent dropout."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dropfx.errors import InvalidOption
from dropfx.pattern_statistics.exact import Bernoulli, Figures, exact, place_weights
from dropfx.pattern_statistics.sampled import sample
from dropfx.patterns import BY_NAME, Pattern, PatternRefused, Tile

_FIGURES = tuple(figure.name for figure in fields(Figures))


@dataclass(frozen=True, kw_only=True)
class Statistics(Figures):
    """What `dropfx.statistics` found: the figures of one draw, see `Figures`, and those of a batch of groups.

    Attributes:
        pattern: the name, or the object's repr.
        rate, drawn_rate: the p asked for; the exact probability with which every place is dropped.
        units: length of the axis; of `tile`: rows and columns of the weight.
        places: what is kept or dropped whole: units, or tiles of the weight.
        groups: draws per batch.
        samples: batches drawn for the sampled figures.
        marginals: share of sampled draws that dropped each unit (tiles: those of each diagonal r + c).
        groups_keeping: fewest and most groups of a batch that kept a unit; None of one group.
        group_correlation: of a unit's keep indicators in two groups of a batch; None of one group.
        exact: names of the figures that are closed forms; the others are sampled.
        source: the pattern object.
    """

    pattern: str
    rate: float
    drawn_rate: float
    units: int
    places: int
    groups: int
    samples: int
    marginals: tuple[float, ...]
    groups_keeping: tuple[int, int] | None
    group_correlation: float | None
    exact: frozenset[str]
    source: Pattern = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The statistics as plain data, ready for JSON."""
        plain = {**asdict(self), "exact": sorted(self.exact)}
        del plain["source"]
        return plain

    def __str__(self) -> str:
        reference = statistics("bernoulli", self.drawn_rate, self.places, samples=0)
        out = io.StringIO()
        Console(file=out, width=160).print(table([self, reference]))
        return out.getvalue().rstrip() + "\n~ by sampling; all other figures are exact"

    def plot(self, path: str | Path) -> None:
        """Write a picture to `path`: successive draws, pair correlations, kept shares (needs the `plot` extra).

        Raises:
            DropfxError: matplotlib is not installed.
        """
        from dropfx.pattern_statistics.picture import picture  # it draws what this module computes

        picture([self], path)


def statistics(pattern: str | Pattern, rate: float, units: int, groups: int = 1, samples: int = 4096) -> Statistics:
    """Statistics of a pattern's draws beside those of independent dropout.

    Figures have closed forms where `.exact` names them; the others are sampled, with fixed numbers, by the code that
    draws in training.

    Args:
        pattern: "block", "slice", "row", "tile", an object of `dropfx.patterns`, or the reference "bernoulli".
        rate: drop probability, above 0 and below 1.
        units: length of the axis, at least 2; for `tile` the rows and columns of a square weight.
        groups: draws per batch, at least 1.
        samples: batches to draw; 0 leaves the sampled figures out.

    Raises:
        InvalidOption: an argument is not accepted, or the pattern cannot serve the axis at that rate.
    """
    chosen = _make_pattern(pattern)
    fit_units = _check(chosen, rate, units, groups, samples)
    try:
        fit = chosen.fit(fit_units, float(rate), groups)
    except PatternRefused as error:
        raise InvalidOption(
            f"pattern: got {pattern!r}, which refuses rate={rate:g}, units={units}, groups={groups}: {error}"
        ) from error
    figures = exact(chosen, fit, units)
    drawn = sample(chosen, fit, units, samples, pairs=figures is None) if samples else None
    if figures is None:
        if drawn is None:
            raise InvalidOption(f"samples: got 0, but {pattern!r} has no closed forms; accepted are integers >= 1")
        found, names = drawn.figures, frozenset({"drawn_rate"})
    else:
        found, names = figures, frozenset({"drawn_rate", *_FIGURES})
    several = drawn if groups > 1 else None
    return Statistics(
        **{name: getattr(found, name) for name in _FIGURES},
        pattern=pattern if isinstance(pattern, str) else repr(pattern),
        rate=float(rate),
        drawn_rate=fit.drawn_rate,
        units=units,
        places=int(place_weights(chosen, units).sum()),
        groups=groups,
        samples=samples,
        marginals=drawn.marginals if drawn else (),
        groups_keeping=several.groups_keeping if several else None,
        group_correlation=several.group_correlation if several else None,
        exact=names,
        source=chosen,
    )


def _make_pattern(pattern: str | Pattern) -> Pattern:
    """The pattern of that name, or the object itself.

    Raises:
        InvalidOption: there is none.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if pattern == Bernoulli.name:
        return Bernoulli()
    if not isinstance(pattern, str) or pattern not in BY_NAME:
        accepted = ", ".join(map(repr, (*BY_NAME, Bernoulli.name)))
        raise InvalidOption(f"pattern: got {pattern!r}, accepted are {accepted} and dropfx.patterns objects")
    return BY_NAME[pattern]()


def _check(pattern: Pattern, rate: float, units: int, groups: int, samples: int) -> int:
    """Check the numbers; returns the length of the axis that the pattern is fitted to."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1:
        raise InvalidOption(f"rate: got {rate!r}, accepted are numbers above 0 and below 1")
    for name, value, least in (("units", units, 2), ("groups", groups, 1), ("samples", samples, 0)):
        if type(value) is not int or value < least:
            raise InvalidOption(f"{name}: got {value!r}, accepted are integers >= {least}")
    return pattern.tiles(units, units) if isinstance(pattern, Tile) else units


def table(results: Sequence[Statistics]) -> Table:
    """The figures side by side, a column each; "~" marks the sampled ones."""
    shown = Table("", title=f"one draw, p = {results[0].rate:g}")
    for result in results:
        shown.add_column(result.pattern, justify="right")
    columns = [_column(result) for result in results]
    for label in dict.fromkeys(label for column in columns for label in column):
        shown.add_row(label, *(column.get(label, "") for column in columns))
    return shown


def _column(s: Statistics) -> dict[str, str]:
    def figure(name: str, form: str) -> str:
        """A figure of the table, marked `~` where it is sampled; empty where the pattern has none."""
        value = getattr(s, name)
        return "" if value is None else ("" if name in s.exact else "~") + format(value, form)

    column = {
        "units or tiles": str(s.places),
        "P(dropped)": f"{s.drawn_rate:.4f}",
        "pair correlation, mean": figure("pair_mean", "+.4f"),
        "pair correlation, neighbours": ("" if "pair_correlations" in s.exact else "~")
        + f"{s.pair_correlations[0]:+.4f}",
        "pair correlation, worst": figure("pair_worst", "+.4f"),
        "second moment": figure("second_moment", ".4f"),
        "sd of the kept share": figure("kept_share_sd", ".4f"),
        "sd of the scale noise": figure("gain_sd", ".4f"),
        "entropy, bits": figure("entropy", ".1f"),
        "sub-models": "" if s.log2_models is None else _models(s.log2_models),
    }
    if s.dropped_columns is not None:
        column["columns of tiles dropped whole"] = figure("dropped_columns", ".4f")
    if s.marginals:
        column[f"P(dropped) in {s.samples} draws"] = f"~{min(s.marginals):.4f} .. {max(s.marginals):.4f}"
    if s.groups_keeping is not None:
        column[f"groups of {s.groups} that keep a unit"] = "~{} .. {}".format(*s.groups_keeping)
        column["correlation of two groups"] = figure("group_correlation", "+.4f")
    return column


def _models(bits: float) -> str:
    return f"{round(2**bits)}" if bits < 20 else f"2^{bits:.1f}"
