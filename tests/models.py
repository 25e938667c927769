"""The catalogue `CASES`: name -> small model. The models live in files by meaning."""

from __future__ import annotations

from tests import (
    models_arguments,
    models_attention,
    models_axes,
    models_cells,
    models_hooks,
    models_inplace,
    models_masks,
    models_modules,
    models_products,
    models_python,
    models_recurrent,
    models_regions,
    models_residual,
    models_units,
)
from tests.case import CASES, Case

FILES = (
    models_regions,
    models_residual,
    models_units,
    models_axes,
    models_products,
    models_inplace,
    models_modules,
    models_attention,
    models_python,
    models_recurrent,
    models_arguments,
    models_cells,
    models_hooks,
    models_masks,
)

__all__ = ["CASES", "Case"]
