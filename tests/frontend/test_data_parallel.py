"""Dynamo splits the graph of a DistributedDataParallel model at its buckets, and asks each part for shapes first."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dropfx
from tests.catalogue.case import mlp
from tests.frontend.steps import slow
from tests.oracle import comparison, oracle


class Net(nn.Module):
    """Parameters of several buckets (the first one holds 1 MiB)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(48, 512, 512, 512, 8, activation=nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.fixture(autouse=True)
def _process_group(tmp_path: pathlib.Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{"pattern": "row"}, slow({}), slow({"groups": 2})], ids=str)
@pytest.mark.parametrize("inner", [slow("eager"), "aot_eager"])
def test_split_graphs(inner: str, options: dict[str, Any]) -> None:
    original = Net().double()
    wrapped = DistributedDataParallel(copy.deepcopy(original))
    compiled = torch.compile(wrapped, backend="dropfx", options={"inner": inner, "min_speedup": 0, **options})
    for rows in (6, 5, 7):
        x = torch.randn(rows, 48).double()
        for model in (original, compiled):
            model.zero_grad()
        with dropfx.testing.record() as masks:
            y = compiled(x)
        y.square().sum().backward()
        assert [set(frame) for frame in masks] == [{"net.2", "net.5"}, {"net.8"}]
        with oracle.replaced_dropout(original, masks[0] | masks[1]):
            want = original(x)
        want.square().sum().backward()
        assert not comparison.difference(y.detach(), want.detach(), 1e-10, 0.0)
        for ours, theirs in zip(compiled.parameters(), original.parameters(), strict=True):
            assert not comparison.difference(ours.grad, theirs.grad, 1e-10, 0.0)
