"""Layers that spell a Linear's product in another way, and products that are none."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.catalogue.case import case, vectors


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: a Linear whose weight lies as [in, out]."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.outer = outer
        self.weight = nn.Parameter(0.1 * torch.randn(inner, outer))
        self.bias = nn.Parameter(torch.randn(outer))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.size()[:-1], self.outer)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


# with groups the region of resid_drop ends at the view, which moves the axis along which they lie
@case("conv1d", vectors(64, 5), rewritten=("drop",), optional=("resid_drop",))
class Conv1DBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.proj = Conv1D(64, 128), Conv1D(128, 64)
        self.drop, self.resid_drop = nn.Dropout(0.5), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.resid_drop(self.proj(self.drop(F.gelu(self.fc(x), approximate="tanh"))))


class Product(nn.Module):
    """second(drop(gelu(first(x)))) with the two products given."""

    def __init__(self, first: Callable[..., Tensor], second: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Parameter(0.1 * torch.randn(64, 96)), nn.Parameter(0.1 * torch.randn(96, 32))
        self.outer_rows = nn.Parameter(0.1 * torch.randn(32, 96))
        self.bias, self.shift = nn.Parameter(torch.randn(96)), nn.Parameter(torch.randn(32))
        self.drop, self.first, self.second = nn.Dropout(0.5), first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(F.gelu(self.first(x, self))), self)


# (first, second) product, both of them Linears in disguise
LINEARS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "operator": (lambda x, m: x @ m.inner + m.bias, lambda h, m: h @ m.outer),
    "matmul": (lambda x, m: torch.matmul(x, m.inner), lambda h, m: h.matmul(m.outer) + m.shift),
    "rows_transposed": (lambda x, m: x @ m.inner, lambda h, m: h @ m.outer_rows.t()),
    "rows_attribute": (lambda x, m: x @ m.inner, lambda h, m: h @ m.outer_rows.T + m.shift),
    "rows_matrix_attribute": (lambda x, m: x @ m.inner, lambda h, m: torch.matmul(h, m.outer_rows.mT)),
    "rows_swapped": (lambda x, m: x @ m.inner, lambda h, m: h @ m.outer_rows.transpose(-1, 0)),
}
TWO_DIMS = {
    "mm": (lambda x, m: torch.mm(x, m.inner), lambda h, m: h.mm(m.outer)),
    "addmm": (lambda x, m: torch.addmm(m.bias, x, m.inner), lambda h, m: m.shift.addmm(h, m.outer)),
}
# not Linears: they run as written
OTHERS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "computed_matrix": (lambda x, m: x @ m.inner.tanh(), lambda h, m: h @ m.outer.abs()),
    "scaled_addmm": (
        lambda x, m: torch.addmm(m.bias, x, m.inner, alpha=2.0),
        lambda h, m: torch.addmm(m.shift, h, m.outer, beta=0.5),
    ),
    "addmm_of_rows": (lambda x, m: torch.addmm(x[:, :1], x, m.inner), lambda h, m: torch.addmm(h[:, :32], h, m.outer)),
    "batched": (lambda x, m: x @ m.inner.expand(2, 64, 96), lambda h, m: h @ m.outer.expand(2, 96, 32)),
    "vector": (lambda x, m: x @ m.inner.cumsum(0), lambda h, m: h @ m.bias),
    "matrix_on_the_left": (lambda x, m: (m.inner.t() @ x.t()).t(), lambda h, m: (m.outer_rows @ h.t()).t()),
}

for name, (first, second) in LINEARS.items():
    case(f"product_{name}", vectors(64, 3), rewritten=("drop",))(lambda f=first, s=second: Product(f, s))
for name, (first, second) in TWO_DIMS.items():
    case(f"product_{name}", vectors(64), rewritten=("drop",))(lambda f=first, s=second: Product(f, s))
for name, (first, second) in OTHERS.items():
    case(f"other_product_{name}", vectors(64), left=("drop",))(lambda f=first, s=second: Product(f, s))
