"""Patterns: the rules by which a step's kept units are drawn (design section 6)."""

from dropfx.patterns.base import MAX_RATE_ERROR, Pattern, PatternRefused, Realisation
from dropfx.patterns.block import Block
from dropfx.patterns.slice import Slice

BY_NAME: dict[str, type[Block] | type[Slice]] = {"block": Block, "slice": Slice}

__all__ = ["BY_NAME", "MAX_RATE_ERROR", "Block", "Pattern", "PatternRefused", "Realisation", "Slice"]
