"""All draws in one launch: bit for bit what PyTorch's operations draw, on this device and on a CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dropfx.draws import draw_plan
from dropfx.draws.draw_plan import DrawPlan
from dropfx.kernels import draw as kernel
from dropfx.patterns import Block, Pattern, Row, Slice

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plans(pattern: Pattern, *axes: tuple[int, float], groups: int = 1) -> tuple[DrawPlan, DrawPlan]:
    """The same sites drawn on the CPU by PyTorch, and here by the kernel."""
    fits = [pattern.fit(units, rate, groups) for units, rate in axes]
    names = [f"layer.{number}" for number in range(len(fits))]
    return DrawPlan(names, fits, pattern, CPU), DrawPlan(names, fits, pattern, DEVICE, by_kernel=True)


def assert_alike(pattern: Pattern, *axes: tuple[int, float], number: int, groups: int = 1) -> None:
    plain, ours = plans(pattern, *axes, groups=groups)
    for theirs, mine in zip(
        plain.draw(torch.tensor(number)), ours.draw(torch.tensor(number, device=DEVICE)), strict=True
    ):
        assert torch.equal(mine.starts.cpu(), theirs.starts)
        assert mine.starts.dtype == torch.int64
        assert mine.run == theirs.run
        if isinstance(theirs.scale, Tensor):
            assert torch.equal(mine.scale.cpu(), theirs.scale)
        else:
            assert mine.scale == theirs.scale


NUMBERS = [0, 1, -1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("pattern", [Block(), Block(1), Block(7), Slice()], ids=str)
def test_draws_alike(pattern: Pattern, number: int) -> None:
    """Sites of several shapes in one launch; blocks of 7 are ragged on some."""
    assert_alike(pattern, (64, 0.5), (70, 0.3), (1000, 0.9), (64, 0.5), number=number)


@settings(max_examples=40, deadline=None)
@given(
    number=st.integers(-(2**63), 2**63 - 1),
    blocks=st.integers(2, 300),
    size=st.integers(1, 9),
    rate=st.floats(0.01, 0.99),
)
def test_draws_alike_whatever_the_number(number: int, blocks: int, size: int, rate: float) -> None:
    assert_alike(Block(size), (blocks * size, rate), number=number)


def test_draws_alike_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (1, 2, 77):
        monkeypatch.setattr(draw_plan, "data_parallel_rank", lambda rank=rank: rank)
        assert_alike(Block(), (64, 0.5), number=5)


def test_largest_axis() -> None:
    assert_alike(Block(1), (kernel.MAX_SLOTS, 0.5), number=3)


def test_what_the_kernel_does_not_serve_is_drawn_by_pytorch() -> None:
    for pattern, axis, groups in (
        (Block(1), (kernel.MAX_SLOTS + 1, 0.5), 1),
        (Block(), (64, 0.5), 4),
        (Row(), (64, 0.5), 1),
    ):
        plan = plans(pattern, axis, groups=groups)[1]
        assert plan._launch is None
        assert_alike(pattern, axis, number=3, groups=groups)
    assert plans(Block(), (64, 0.5))[1]._launch is not None


def test_equal_hashes_keep_exactly_as_many() -> None:
    """Two sites of one key have one draw; a factor of 0 makes all hashes equal: the first ones count."""
    site = kernel.DrawnSite(key=3, slots=50, kept=20, units=2)
    (starts,) = kernel.DrawLaunch([site], (1, 0, 0), DEVICE, window=False)(torch.tensor(9, device=DEVICE))
    assert starts.tolist() == list(range(0, 40, 2))


def test_sites_begin_where_compilers_expect_it() -> None:
    """16 bytes."""
    plan = plans(Block(1), (10, 0.5), (6, 0.5), (10, 0.7), (10, 0.5))[1]
    assert all(d.starts.storage_offset() % 2 == 0 for d in plan.draw(torch.tensor(1, device=DEVICE)))


def test_draws_stay_of_their_call() -> None:
    """A later call leaves the memory of an earlier one alone: backward still needs it."""
    plan = plans(Block(1), (64, 0.5))[1]
    first = plan.draw(torch.tensor(1, device=DEVICE))[0].starts
    before = first.clone()
    plan.draw(torch.tensor(2, device=DEVICE))
    assert torch.equal(first, before)
