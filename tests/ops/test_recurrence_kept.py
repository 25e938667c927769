"""A recurrence whose W_hh keeps columns or rows, against that with the dense masked weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from dropfx import ops
from dropfx.ops.kept import Kept
from dropfx.ops.recurrent import product
from dropfx.ops.recurrent.cells import GATES
from dropfx.ops.runs import gather, scatter

KINDS = tuple(GATES)
FACES = ("registered", "eager")
KEPT = {
    "blocks": (torch.tensor([2, 6]), 2),
    "units": (torch.tensor([1, 2, 7]), 1),
    "window": (torch.tensor([3]), 4),
    "window that wraps": (torch.tensor([6]), 5),
    "ragged blocks": (torch.tensor([0, 6]), 3),
}
UNITS = 8


def face(name: str) -> Callable[..., Any]:
    return ops.recurrence_op if name == "registered" else ops.EAGER[ops.recurrence_op]


class Case:
    """Operands of a recurrence, and a dense weight of which rows or columns are kept."""

    def __init__(self, kind: str, kept: tuple[Tensor, int], axis: int, *, proj: int = 0, packed: bool = False) -> None:
        torch.manual_seed(0)
        self.kind, self.kept, self.axis = kind, Kept(*kept), axis
        rows, width = GATES[kind] * UNITS, proj or UNITS
        self.packed = packed
        self.operands = {
            "pre": self._leaf(6 if packed else (3, 3), rows),
            "h0": self._leaf(3, width),
            "c0": self._leaf(3, UNITS) if kind == "lstm" else None,
            "w_hh": self._leaf(rows, width),
            "b_hh": self._leaf(rows) if kind == "gru" else None,
            "w_hr": self._leaf(proj, UNITS) if proj else None,
        }

    @staticmethod
    def _leaf(*shape: Any) -> Tensor:
        sizes = [s for part in shape for s in (part if isinstance(part, tuple) else (part,))]
        return torch.randn(*sizes, dtype=torch.float64).requires_grad_()

    def leaves(self) -> list[Tensor]:
        return [operand for operand in self.operands.values() if operand is not None]

    def scale(self) -> Tensor:
        """Of each kept unit; the padding of a ragged block, whose unit is another's too, counts for nothing."""
        units = self.kept.units(self.operands["w_hh"].size(self.axis)).tolist()
        first = [1.5 if unit not in units[:place] else 0.0 for place, unit in enumerate(units)]
        return torch.tensor(first, dtype=torch.float64)

    def compact(self, w_hh: Tensor) -> Tensor:
        shape = (-1, 1) if self.axis == 0 else (1, -1)
        return gather(w_hh, self.axis, self.kept) * self.scale().view(shape)

    def arguments(self, w_hh: Tensor) -> tuple[Any, ...]:
        given = {**self.operands, "w_hh": w_hh}
        sizes = torch.tensor([3, 2, 1]) if self.packed else None
        return self.kind, *given.values(), sizes, self.packed

    def ours(self, which: str) -> tuple[Tensor, ...]:
        kept = self.kept.starts, self.kept.run
        places = (*kept, None, 0) if self.axis == 0 else (None, 0, *kept)
        return self._read(face(which)(*self.arguments(self.compact(self.operands["w_hh"])), *places))

    def theirs(self, which: str) -> tuple[Tensor, ...]:
        w_hh = self.operands["w_hh"]
        dense = scatter(self.compact(w_hh), self.axis, self.kept, w_hh.size(self.axis))
        return self._read(face(which)(*self.arguments(dense)))

    def _read(self, made: Any) -> tuple[Tensor, ...]:
        return tuple(made[: 3 if self.kind == "lstm" else 2])


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_masked_weight(kind: str, kept: str, axis: int, which: str) -> None:
    case = Case(kind, KEPT[kept], axis)
    ours, theirs = case.ours(which), case.theirs(which)
    torch.testing.assert_close(ours, theirs)
    got, want = (torch.autograd.grad(sum(v.square().sum() for v in made), case.leaves()) for made in (ours, theirs))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("kind", "given"),
    [*((kind, {}) for kind in KINDS), ("lstm", {"proj": 8}), ("gru", {"packed": True}), ("lstm", {"packed": True})],
    ids=str,
)
def test_gradcheck(kind: str, given: dict[str, Any], axis: int, which: str) -> None:
    case = Case(kind, KEPT["blocks"], axis, **given)

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        names = [name for name, operand in case.operands.items() if operand is not None]
        case.operands.update(zip(names, leaves, strict=True))
        return case.ours(which)

    torch.autograd.gradcheck(run, case.leaves())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_opcheck(kind: str, axis: int) -> None:
    case = Case(kind, KEPT["blocks"], axis)
    kept = case.kept.starts, case.kept.run
    places = (*kept, None, 0) if axis == 0 else (None, 0, *kept)
    compact = case.compact(case.operands["w_hh"]).detach().requires_grad_()
    opcheck(ops.recurrence_op, (*case.arguments(compact), *places))


@pytest.mark.parametrize("axis", [0, 1])
def test_packed_product_of_a_kept_weight(axis: int) -> None:
    """In single precision, of a weight so large that the product packs what is kept of it."""
    torch.manual_seed(0)
    kept = Kept(torch.arange(0, 512, 128), 64)
    weight, x, y = torch.randn(1280 if axis else 512, 512 if axis else 1280), torch.randn(5, 512), torch.randn(5, 1280)
    x, y = (x, y) if axis else (torch.randn(5, 1280), torch.randn(5, 512))
    compact = gather(weight, axis, kept).contiguous()
    assert product._pays(compact, 8)
    made = product.product_with(compact, 5, 8, **{"cols" if axis else "rows": kept})(x, y)
    dense = scatter(compact, axis, kept, 512)
    torch.testing.assert_close(made, x @ dense.t() + y, rtol=1e-4, atol=1e-4)
