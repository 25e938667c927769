"""Flat arguments of registered ops, and the structs that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dropfx import ops
from dropfx.ops.flat import Layout
from dropfx.ops.kept import Kept

STARTS = torch.tensor([0, 8])


def reference(x: Tensor, rows: Kept | None, cols: Kept, scale: float, after: Tensor | None = None) -> Tensor:
    return x


def test_the_schema_has_the_fields_in_a_row() -> None:
    parameters = Layout(reference).flattened(reference).__signature__.parameters  # type: ignore[attr-defined]
    names = "x rows rows_run cols cols_run scale after rows_leading cols_leading"
    assert list(parameters) == names.split()
    assert parameters["rows"].annotation == Tensor | None
    assert parameters["cols"].annotation is Tensor


@pytest.mark.parametrize("rows", [None, Kept(STARTS, 4), Kept(STARTS, 4, 6)])
def test_there_and_back(rows: Kept | None) -> None:
    layout, x, cols = Layout(reference), torch.zeros(1), Kept(STARTS, 2, 3)
    flat = layout.flat([x, rows, cols, 0.5, None])
    assert len(flat) == 9
    assert layout.grouped(flat) == [x, rows, cols, 0.5, None]
    assert layout.flattened(lambda *args: args)(*flat) == (x, rows, cols, 0.5, None)


def test_what_is_left_out_at_the_end_has_its_default() -> None:
    layout, x, cols = Layout(reference), torch.zeros(1), Kept(STARTS, 2)
    flat = layout.flat([x, None, cols, 0.5])
    assert flat == (x, None, 0, STARTS, 2, 0.5)
    assert layout.grouped(flat) == [x, None, cols, 0.5, None]


def test_gradients_are_padded_to_all_arguments() -> None:
    assert Layout(reference).padded([1, 2]) == (1, 2, *[None] * 7)


def test_registered_ops_have_such_schemas() -> None:
    names = [argument.name for argument in ops.gather_op._schema.arguments]
    assert names == ["x", "kept", "kept_run", "dim", "kept_leading"]
