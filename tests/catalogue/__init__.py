"""The catalogue `CASES`: name -> small model. The models live in files by meaning."""

from __future__ import annotations

from tests.catalogue import (
    arguments,
    attention,
    axes,
    cells,
    convolutions,
    hooks,
    inplace,
    masks,
    modules,
    products,
    python,
    recurrent,
    regions,
    residual,
    units,
)
from tests.catalogue.case import CASES, Case

FILES = (
    regions,
    residual,
    units,
    axes,
    products,
    inplace,
    modules,
    attention,
    python,
    recurrent,
    arguments,
    cells,
    convolutions,
    hooks,
    masks,
)

__all__ = ["CASES", "Case"]
