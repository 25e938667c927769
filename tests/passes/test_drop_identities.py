"""What changes nothing does not end a region: both Linears around it skip work, and the step is exact."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropfx
from tests.promises.both_ways import Body, check_both_ways

IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "rate_0": lambda h: F.dropout(h, 0.0),
    "rate_0_module": nn.Dropout(0.0),
    "dropout_off": lambda h: F.dropout(h, 0.5, False),
    "dropout1d_rate_0": lambda h: F.dropout1d(h[None], 0.0)[0],
    "cat_of_one": lambda h: torch.cat([h], -1),
    "cat_of_one_row": lambda h: torch.cat((h,)),
    "cat_of_one_transposed": lambda h: torch.cat([h.t()]).view(64, -1).t(),
    "identity": nn.Identity(),
    "to": lambda h: h.to(h.dtype),
    "to_device": lambda h: h.to("cpu"),
    "to_like": lambda h: h.to(h),
    "type_as": lambda h: h.type_as(h),
    "double": lambda h: h.double(),
    "cpu": lambda h: h.cpu(),
    "contiguous": lambda h: h.contiguous(),
    "clone": lambda h: h.clone(),
    "view": lambda h: h.view(h.shape),
    "view_as": lambda h: h.view_as(h),
    "reshape": lambda h: h.reshape(h.shape),
    "reshape_to_width": lambda h: h.reshape(-1, 64),
    "expand": lambda h: h.expand(h.shape),
    "expand_rest": lambda h: h.expand(-1, 64),
    "expand_as": lambda h: h.expand_as(h),
    "broadcast_to": lambda h: h.broadcast_to(h.shape),
    "repeat": lambda h: h.repeat(1, 1),
    "tile": lambda h: torch.tile(h, (1, 1)),
    "squeezed": lambda h: h.unsqueeze(1).squeeze(1),
    "squeezed_last": lambda h: h.unsqueeze(-1).squeeze(-1),
    "ellipsis": lambda h: h[...],
    "slice": lambda h: h[:],
    "slice_from_0": lambda h: h[0:, 0:],
    "slice_to_width": lambda h: h[:, :64],
    "slice_beyond": lambda h: h[..., :100],
    "slice_to_length": lambda h: h[: h.size(0)],
    "narrow": lambda h: h.narrow(1, 0, 64),
    "one_chunk": lambda h: h.chunk(1, -1)[0],
    "one_part": lambda h: h.split(64, -1)[0],
    "pad": lambda h: F.pad(h, (0, 0)),
    "plus": lambda h: +h,
}


def forward(op: Callable[[Tensor], Tensor], place: str) -> Callable[[Any, Tensor], Tensor]:
    if place == "before":
        return lambda m, x: m.c(m.d(op(m.a(x).tanh())))
    return lambda m, x: m.c(op(m.d(m.a(x).tanh())))


@pytest.mark.parametrize(
    ("name", "place"), list(zip(IDENTITIES, itertools.cycle(["before", "after"]), strict=False))
)  # of its dropout
def test_both_linears_skip_work(name: str, place: str) -> None:
    x, body = torch.randn(12, 32, dtype=torch.float64), forward(IDENTITIES[name], place)
    check_both_ways(body, x, rewritten={"d"})
    report = dropfx.explain(Body(body).double(), x, options={"min_speedup": 0, "groups": 1})
    assert sum(site.flops_dense for site in report.sites) == report.flops_dense


NO_IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows_of_the_trace": lambda h: h[:12],
    "narrowed_to_the_trace": lambda h: h.narrow(0, 0, 12),
    "part_of_the_trace": lambda h: h.split(12)[0],
    "repeated": lambda h: h.repeat(2, 1),
    "copy_of_an_output": lambda h: torch.cat([h]),
}


@pytest.mark.parametrize("name", NO_IDENTITIES)
def test_other_sizes_than_the_traces(name: str) -> None:
    """Longer inputs afterwards, of which the operation takes a part."""
    op = NO_IDENTITIES[name]
    model = dropfx.compile(Body(lambda m, x: op(m.c(m.d(m.a(x))))).double(), min_speedup=0, groups=1)
    for rows in (12, 16, 20):
        x = torch.randn(rows, 32, dtype=torch.float64)
        assert model(x).shape == (*op(x).shape[:1], 8)


def test_result_is_another_tensor_than_the_input() -> None:
    model = dropfx.compile(Body(lambda m, x: (torch.cat([x]), m.c(m.d(m.a(x))))), min_speedup=0)
    x = torch.randn(12, 32)
    assert model(x)[0].data_ptr() != x.data_ptr()


def test_rate_that_rises_from_0() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.d, self.e = nn.Linear(32, 64), nn.Linear(64, 8), nn.Dropout(0.5), nn.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.e(self.d(self.a(x))))

    model = dropfx.compile(Both(), min_speedup=0)
    x = torch.randn(12, 32)
    for rate, sites in ((0.0, {"d"}), (0.5, {"d", "e"}), (0.0, {"d"})):
        model.e.p = rate
        with dropfx.testing.record() as masks:
            model(x)
        assert set(masks[-1]) == sites
