"""Writes in place around operations with several results, which share the written memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.promises.both_ways import check_both_ways

Split = Callable[[Tensor], Sequence[Tensor]]

WITH_GRADIENT: dict[str, Split] = {  # autograd lets their parts be written
    "tensor_split": lambda h: torch.tensor_split(h, 2, -1),
    "tensor_split_at": lambda h: h.tensor_split((16,), -1),
    "hsplit": lambda h: torch.hsplit(h, [2]),
    "vsplit": lambda h: h.vsplit(2),
    "dsplit": lambda h: torch.dsplit(h, 2),
    "unsafe_chunk": lambda h: torch.unsafe_chunk(h, 2, -1),
    "unsafe_split": lambda h: torch.unsafe_split(h, 3),
    "unsafe_split_with_sizes": lambda h: torch.unsafe_split_with_sizes(h, [2, 3], 1),
    "split_of_split": lambda h: torch.tensor_split(torch.tensor_split(h, 2, -1)[1], 2, 1),
}
WITHOUT: dict[str, Split] = {
    **WITH_GRADIENT,
    "chunk": lambda h: h.chunk(2, -1),
    "split": lambda h: h.split(8, -1),
    "split_with_sizes": lambda h: torch.split_with_sizes(h, [8, 24], -1),
    "unbind": lambda h: h.unbind(1),
    "unbind_select": lambda h: [h.unbind(1)[2].select(0, 1), h.unbind(1)[0]],
    "chunk_of_chunk": lambda h: h.chunk(2, -1)[0].chunk(2, 1),
}


@pytest.mark.parametrize("name", WITH_GRADIENT)
@pytest.mark.parametrize("place", ["before", "after"])
def test_part_written_behind_a_functional_write(name: str, place: str) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.a(x) if place == "before" else m.d(m.a(x))
        h += 1.0
        first, *_, last = WITH_GRADIENT[name](h)
        first.neg_()
        last.mul_(2.0)
        return m.b(m.d(h) if place == "before" else h), last * 1.0

    check_both_ways(forward, rewritten={"d"})


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_dropout_in_place_on_a_part(name: str) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.a(x)
        h *= 1.5
        part = WITH_GRADIENT[name](h)[0]
        total = part.sum()
        F.dropout(part, 0.5, True, True)
        return m.b(h), total

    check_both_ways(forward, rewritten=set(), left=(":dropout_1",))


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize("early", [False, True], ids=["split_behind", "split_before"])
def test_split_of_what_asks_no_gradient(name: str, early: bool) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        h = x.clone()
        parts = WITHOUT[name](h) if early else ()
        h *= 1.5
        parts = parts or WITHOUT[name](h)
        total = parts[0].sum()
        parts[0].neg_()
        h += 0.25
        parts[-1].mul_(2.0)
        return m.b(m.d(m.a(h))), total, parts[0] + 1.0

    check_both_ways(forward, rewritten={"d"}, input_grad=False)


def test_other_results_are_no_aliases() -> None:
    """The values are written, the indices read behind it."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.a(x)
        top = torch.topk(h, 3, dim=1)
        top.values.add_(1.0)
        return m.b(m.d(top.values.relu_())), top.indices

    check_both_ways(forward, rewritten={"d"})


def test_written_by_an_out_argument() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        buffer = torch.zeros_like(x)
        rows = buffer.unbind(1)
        torch.add(x, 1.0, out=buffer)
        total = buffer * 1.0
        buffer.mul_(2.0)
        return m.b(m.d(m.a(x) * rows[1].sum())) + total.sum()

    check_both_ways(forward, rewritten={"d"}, input_grad=False)
