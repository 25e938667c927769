"""The products of a grouped Linear against products with masked dense tensors, whichever way they are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dropfx.ops import EAGER, linear_op, parts
from dropfx.patterns import Block, Pattern, Slice

N, K = 24, 32
WAYS = ("stacked", "one by one", "weight gradient at once")
PATTERNS = [Block(4), Block(8), Block(5), Block(1), Slice()]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(parts, "_STACKED", 0 if request.param == "one by one" else 2**62)
    monkeypatch.setattr(parts.Parts, "_dense_pays", lambda self, rows: request.param == "weight gradient at once")
    return str(request.param)


class Case:
    """Rows in groups, of which an axis keeps units of its own."""

    def __init__(self, pattern: Pattern, sides: str, leading: int, groups: int, transposed: bool = False) -> None:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        self.units: dict[str, Tensor] = {}
        fields: dict[str, tuple[Tensor | None, int, int]] = {"rows": (None, 0, 0), "cols": (None, 0, 0)}
        for side, size in (("rows", N), ("cols", K)):
            if side in sides:
                fit = pattern.fit(size, 0.5, groups)
                hashes = torch.randint(-(2**62), 2**62, (1, fit.numbers), generator=generator)
                (draw,) = pattern.choose(hashes, fit)
                fields[side] = draw.starts, draw.run, leading
                self.units[side] = draw.units()
        self.fields, self.leading, self.groups = fields, leading, groups
        width = self.units["cols"].size(1) if "cols" in sides else K
        weight = torch.randn(N, K, dtype=torch.float64)
        weight = weight.t().contiguous().t() if transposed else weight
        x, bias = torch.randn(leading, 3, width, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
        self.leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def made(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """By the gathered op."""
        (starts, run, leading), (others, width, length) = self.fields["rows"], self.fields["cols"]
        result: Tensor = EAGER[linear_op](x, weight, bias, starts, run, others, width, 1.5, leading, length)
        return result

    def expected(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Group by group, by indexing."""
        found = []
        for group, rows in enumerate(torch.tensor_split(x, self.groups)):
            out = self.units["rows"][group] if "rows" in self.units else torch.arange(N)
            into = self.units["cols"][group] if "cols" in self.units else torch.arange(K)
            found.append(1.5 * (rows @ weight[out][:, into].t()) + bias[out])
        return torch.cat(found)


def check(case: Case) -> None:
    got, want = case.made(*case.leaves), case.expected(*case.leaves)
    torch.testing.assert_close(got, want)
    gradient = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad(got, case.leaves, gradient), torch.autograd.grad(want, case.leaves, gradient), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("sides", ["rows", "cols", "rows and cols"])
@pytest.mark.parametrize(("leading", "groups"), [(8, 4), (7, 3), (2, 4), (1, 2)])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_products(pattern: Pattern, leading: int, groups: int, sides: str, way: str) -> None:
    check(Case(pattern, sides, leading, groups))


@pytest.mark.parametrize("sides", ["rows", "cols", "rows and cols"])
def test_weight_stored_transposed(sides: str, way: str) -> None:
    case = Case(Block(4), sides, 8, 4, transposed=True)
    check(case)
    (made,) = torch.autograd.grad(case.made(*case.leaves).sum(), case.leaves[1:2])
    assert made.stride() == case.leaves[1].stride()


@pytest.mark.parametrize("sides", ["rows", "cols", "rows and cols"])
def test_second_derivative(sides: str, way: str) -> None:
    case = Case(Block(4), sides, 6, 3)
    torch.autograd.gradgradcheck(case.made, case.leaves)


def test_equal_groups_are_one_stack_and_others_two() -> None:
    def count(leading: int, groups: int) -> int:
        """Parts of so many rows."""
        starts = torch.arange(groups)[:, None] % 2 * 8 + torch.tensor([0, 16])
        kept = parts.Kept(starts, 8, leading)
        return len(parts.Parts(leading * 3, torch.randn(N, K), None, kept)._each)

    assert [count(8, 4), count(7, 3), count(7, 6)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("rows", "groups", "at_once"), [(128, 2, False), (128, 8, True), (700, 2, False), (700, 8, True)]
)
def test_many_groups_of_few_rows_make_the_weight_gradient_at_once(rows: int, groups: int, at_once: bool) -> None:
    """Of a weight [2600, 650] whose columns are kept in runs of 13; of one [2048, 2048] in runs of 64, both sides."""
    wide = rows == 128
    n, k, run = (2048, 2048, 64) if wide else (2600, 650, 13)
    starts = torch.arange(0, k, 2 * run).expand(groups, -1)
    cols = parts.Kept(starts, run, rows)
    kept_rows = parts.Kept(starts, run, rows) if wide else None
    found = parts.Parts(rows, torch.empty(n, k), kept_rows, cols)
    assert found._dense_pays(rows) is at_once
