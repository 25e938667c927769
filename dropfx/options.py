"""Options of `dropfx.compile`: names, checks, and the messages for wrong ones."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dropfx.errors import InvalidOption, LoweringUnavailable
from dropfx.patterns import BY_NAME, Block, Pattern


@dataclass(frozen=True)
class Options:
    """What the user asked of `dropfx.compile`, checked."""

    pattern: Pattern
    lowering: str = "auto"
    min_speedup: float = 1.05
    groups: int | Literal["auto", "faithful", "time"] = "auto"

    @property
    def along_rows(self) -> bool:
        """There are several draws per batch, one for each chunk of the leading axis, whatever that axis is."""
        return isinstance(self.groups, int) and self.groups > 1

    @property
    def as_needed(self) -> bool:
        """Each site has as many draws, along its leading axis, as its rows and its rate call for."""
        return self.groups in ("auto", "faithful")

    @property
    def grouped(self) -> bool:
        """A site may have several draws per call."""
        return self.groups != 1


NAMES = ("pattern", "block", "groups", "recipe", "lowering", "min_speedup")
RECIPES: dict[str, Any] = {"fast": 1, "faithful": "faithful"}
"""Name -> groups."""

LOWERINGS = ("auto", "aten", "triton")


def make_options(
    pattern: str | Pattern = "block",
    block: int | str = "auto",
    groups: int | str = "auto",
    lowering: str = "auto",
    min_speedup: float = 1.05,
    recipe: str | None = None,
    *,
    accepted: Sequence[str] = NAMES,
    **unknown: Any,
) -> Options:
    """Check the options and make the record that the passes use; `accepted`: all that the front end takes.

    Raises:
        InvalidOption: an option is unknown or not accepted.
        LoweringUnavailable: the lowering cannot run here.
    """
    for name in unknown:
        close = difflib.get_close_matches(name, accepted, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidOption(f"unknown option {name!r}, accepted are {', '.join(accepted)}{hint}")
    if groups not in ("auto", "time") and (type(groups) is not int or groups < 1):
        raise InvalidOption(f"groups: got {groups!r}, accepted are 'auto', integers >= 1 (draws per batch) and 'time'")
    if recipe is not None and recipe not in RECIPES:
        raise InvalidOption(f"recipe: got {recipe!r}, accepted are {', '.join(map(repr, RECIPES))}")
    if recipe is not None and groups != "auto":
        raise InvalidOption(f"recipe: got {recipe!r} together with groups={groups!r}, which it would choose")
    if isinstance(min_speedup, bool) or not isinstance(min_speedup, (int, float)) or not min_speedup >= 0:
        raise InvalidOption(f"min_speedup: got {min_speedup!r}, accepted are numbers >= 0")
    _check_lowering(lowering)
    made = _make_pattern(pattern, block)
    chosen: Any = groups if recipe is None else RECIPES[recipe]
    if made.drops_weights:
        if groups not in (1, "auto"):
            raise InvalidOption(
                f"groups: got {groups!r}, but the whole batch shares the tiles of a weight: accepted are 1 and 'auto'"
            )
        chosen = 1
    return Options(made, lowering, float(min_speedup), chosen)


def _make_pattern(pattern: str | Pattern, block: int | str) -> Pattern:
    if isinstance(pattern, Pattern):
        if block != "auto":
            raise InvalidOption(
                f"block: got {block!r} together with pattern={pattern!r}, but `block` is for pattern='block' alone; "
                "give a block size to the object, as in pattern=dropfx.patterns.Block(16)"
            )
        return pattern
    if not isinstance(pattern, str) or pattern not in BY_NAME:
        accepted = ", ".join(map(repr, BY_NAME))
        raise InvalidOption(f"pattern: got {pattern!r}, accepted are {accepted} and dropfx.patterns objects")
    if pattern == "block":
        return Block(block)
    if block != "auto":
        raise InvalidOption(f"block: got {block!r}, but pattern={pattern!r} has no blocks")
    return BY_NAME[pattern]()


def _check_lowering(lowering: str) -> None:
    if lowering not in LOWERINGS:
        raise InvalidOption(f"lowering: got {lowering!r}, accepted are {', '.join(map(repr, LOWERINGS))}")
    if lowering != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        raise LoweringUnavailable("lowering='triton': Triton is not installed (pip install 'triton>=3.6', on Linux)")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise LoweringUnavailable("lowering='triton' needs a GPU, or TRITON_INTERPRET=1 for Triton's interpreter")
