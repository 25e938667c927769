"""The probability with which a draw of ones and zeros keeps, where it is one number."""

from __future__ import annotations

from torch import fx

from dropfx.graph.nodes import argument, op_name
from dropfx.graph.notes import notes

_FILLS = {"full": "fill_value", "full_like": "fill_value", "new_full": "fill_value"}
"""What makes a tensor of one probability -> the name of its second (of the method: second after itself) argument."""


def probability(draw: fx.Node) -> tuple[float | None, bool]:
    """The probability of a one where it is one number, and whether the draw reads it from a tensor filled with it."""
    keep, source = argument(draw, 1, "p"), draw.args[0]
    if draw.kwargs.keys() - {"p"}:  # a generator of its own
        return None, False
    filled = keep is None
    if filled and isinstance(source, fx.Node) and op_name(source) in _FILLS and "pinned" not in notes(source):
        place = 2 if op_name(source) == "new_full" else 1
        keep = argument(source, place, _FILLS[op_name(source)])
    return (keep if isinstance(keep, (int, float)) and 0 < keep <= 1 else None), filled
