"""Patterns: the rules by which the kept units of a forward are drawn."""

from dropfx.patterns.base import (
    MAX_RATE_ERROR,
    Draw,
    Fit,
    Pattern,
    PatternRefused,
    TileDraw,
    padded_scale,
    unwrapped,
)
from dropfx.patterns.block import Block
from dropfx.patterns.lattice import Row, Tile
from dropfx.patterns.rows import RowDraw, Rows
from dropfx.patterns.search import default_max_period, search
from dropfx.patterns.slice import Slice

AnyDraw = Draw | TileDraw | RowDraw

BY_NAME: dict[str, type[Block] | type[Slice] | type[Row] | type[Tile]] = {
    "block": Block,
    "slice": Slice,
    "row": Row,
    "tile": Tile,
}

__all__ = [
    "BY_NAME",
    "MAX_RATE_ERROR",
    "AnyDraw",
    "Block",
    "Draw",
    "TileDraw",
    "Pattern",
    "PatternRefused",
    "Fit",
    "Row",
    "RowDraw",
    "Rows",
    "Slice",
    "Tile",
    "default_max_period",
    "padded_scale",
    "search",
    "unwrapped",
]
