"""A forward of choice against the oracle, compiled both ways: `dropfx.compile`, `torch.compile(backend="dropfx")`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

import dropfx
from tests.catalogue.case import check_step


class Body(nn.Module):
    """32 -> 64 -> 64 -> 8 and what else a forward may need; the forward is given."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.wide, self.d, self.e = nn.Linear(80, 8), nn.Dropout(0.5), nn.Dropout(0.25)
        self.norm, self.layer_norm, self.body = nn.BatchNorm1d(64), nn.LayerNorm(64), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def compiled_both_ways(model: nn.Module, inner: str = "eager", **options: Any) -> Iterator[nn.Module]:
    given = {"min_speedup": 0, "groups": 1, **options}
    yield dropfx.compile(copy.deepcopy(model), **given)
    torch._dynamo.reset()
    captured = copy.deepcopy(model)
    captured.compile(backend="dropfx", options={"inner": inner, **given})
    yield captured


def check_both_ways(
    body: Callable[[Any, Tensor], Any],
    x: Tensor | None = None,
    *,
    rewritten: set[str],
    left: tuple[str, ...] = (),
    input_grad: bool = True,
    **options: Any,
) -> None:
    """Promise 2 for two steps each way, and that exactly the expected sites are rewritten."""
    torch.manual_seed(0)
    model = Body(body).double()
    x = torch.randn(6, 5, 32, dtype=torch.float64) if x is None else x
    for compiled in compiled_both_ways(model, **options):
        for seed in (1, 2):
            masks = check_step(
                model, compiled, (x,), dtype=torch.float64, seed=seed, left_alone=left, input_grad=input_grad
            )
            assert set(masks) == rewritten, type(compiled)
