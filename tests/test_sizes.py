"""Which sizes a trace depends on: none where the number of parts of a split is the program's or a weight's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.capture import trace


class Net(nn.Module):
    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.lin, self.drop, self.body = nn.Linear(64, 96), nn.Dropout(0.5), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.drop(self.lin(x)))


FIXED = {
    "chunk of a layer's units": lambda m, h: h.chunk(3, -1)[0],
    "split of a layer's units": lambda m, h: h.tanh().split(32, dim=2)[1],
    "two chunks": lambda m, h: h.chunk(2, 1)[0],
    "listed sizes": lambda m, h: h.split([1, 4], dim=1)[0],
    "named axis": lambda m, h: h.view(h.size(0), h.size(1), 3, 32).permute(2, 0, 1, 3).unbind(0)[1],
    "full slice": lambda m, h: h[:, 0, :].split(48, -1)[0],
    "parameter": lambda m, h: h + m.lin.bias.split(48)[0].sum(),
}
VARYING = {
    "unbind of rows": lambda m, h: h.unbind(1)[0],
    "chunks of rows": lambda m, h: h.chunk(3, 1)[0],
    "split of rows": lambda m, h: h.split(2, 1)[0],
    "inferred axis": lambda m, h: h.view(-1, 1, 96).unbind()[0],
    "sliced": lambda m, h: h[:, :4].unbind(1)[0],
    "iterated": lambda m, h: sum(row.sum() for row in h),
}


@pytest.mark.parametrize("name", [*FIXED, *VARYING])
def test_exact_sizes_where_the_number_of_parts_varies(name: str) -> None:
    model = Net({**FIXED, **VARYING}[name])
    found = trace(model, (torch.randn(3, 5, 64),), {})
    assert found.exact_shapes == (name in VARYING)
