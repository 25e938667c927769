"""Promises 3 and 4: draws are of exact rate and scale, fresh and reproducible."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropfx
from dropfx.patterns import Block, Slice
from tests.catalogue import CASES
from tests.catalogue.case import recording
from tests.draws.statistics_of_draws import block_kept, compiled, draws, same, site_model, site_report, window_start
from tests.oracle import oracle

PATTERNS = ("block", "slice")
RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95)


# How many are kept


@pytest.mark.parametrize(
    ("pattern", "units", "p"),
    [(PATTERNS[place % 2], *case) for place, case in enumerate(itertools.product((64, 96, 100, 128, 250), RATES))],
)
def test_rate_and_scale_are_exact(units: int, p: float, pattern: str) -> None:
    """The same number of units is dropped in every draw, and the scale makes up for exactly that."""
    site = site_report(units, p, pattern)
    assert site.rewritten, site.reason
    assert site.rate == p
    assert abs(site.drawn_rate - p) <= 0.02
    masks = draws(compiled(units, p, pattern), 10)["1"]
    assert masks.dtype == torch.float64
    assert ((masks == 0) | ((masks - 1.0 / (1.0 - site.drawn_rate)).abs() < 1e-12)).all()
    dropped = (masks == 0).sum(1)
    assert (dropped >= 1).all()
    assert (dropped < units).all()
    if pattern == "slice" or units % 32 == 0:
        assert (dropped == round(site.drawn_rate * units)).all()


@pytest.mark.parametrize(("units", "size"), [(64, 16), (96, 1), (96, 8), (100, 16), (67, 5), (64, 33)])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_explicit_blocks(units: int, size: int, p: float) -> None:
    """Exactly k of the blocks are kept; the rate is that of the blocks, the last of which may be shorter."""
    site = site_report(units, p, Block(size))
    rows = [block_kept(row != 0, size) for row in draws(compiled(units, p, Block(size)), 20)["1"]]
    blocks = -(-units // size)
    assert site.drawn_rate == pytest.approx(rows[0].count(False) / blocks, abs=1e-12)
    assert {row.count(True) for row in rows} == {rows[0].count(True)}
    assert 1 <= rows[0].count(True) < blocks
    # no other number of blocks is closer to the rate
    assert abs(site.drawn_rate - p) <= 0.5 / blocks + 1e-12 or rows[0].count(True) in (1, blocks - 1)


@pytest.mark.parametrize("size", [1, 8, 16])
def test_block_option_is_the_pattern_argument(size: int) -> None:
    model = dropfx.compile(site_model(64, 0.5), block=size, min_speedup=0)
    same = compiled(64, 0.5, Block(size))
    assert torch.equal(draws(model, 5)["1"], draws(same, 5)["1"])


@pytest.mark.parametrize("units", [64, 67, 100])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_slices_are_one_cyclic_window(units: int, p: float) -> None:
    masks = draws(compiled(units, p, Slice()), 30)["1"] != 0
    starts = [window_start(row) for row in masks]
    assert len(set(starts)) > 1
    assert (masks.sum(1) == masks[0].sum()).all()


@pytest.mark.parametrize("p", [0.001, 0.01, 0.99, 0.999])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_extreme_rates_keep_one_and_drop_one(p: float, pattern: str) -> None:
    masks = draws(compiled(128, p, pattern), 5)["1"]
    kept = (masks != 0).sum(1)
    assert (kept >= 1).all()
    assert (kept < 128).all()


@pytest.mark.parametrize(("units", "p"), [(1, 0.5), (2, 0.3), (3, 0.5), (7, 0.25), (10, 0.25), (5, 0.01)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_axis_too_narrow_for_the_rate_is_refused(units: int, p: float, pattern: str) -> None:
    site = site_report(units, p, pattern)
    assert not site.rewritten
    assert site.reason
    original, model = site_model(units, p), compiled(units, p, pattern)
    model.load_state_dict(original.state_dict())
    x = torch.ones(3, 2, dtype=torch.float64)
    with recording() as masks:
        torch.manual_seed(0)
        y = model(x)
    assert not masks
    torch.manual_seed(0)
    assert torch.equal(y, original(x))


@pytest.mark.parametrize(("units", "p"), [(2, 0.5), (10, 0.5), (10, 0.3), (20, 0.25)])
def test_narrow_axis_that_fits_is_rewritten(units: int, p: float) -> None:
    site = site_report(units, p, "block")
    assert site.rewritten, site.reason
    assert site.drawn_rate == pytest.approx(p, abs=1e-12)


def test_fixed_block_off_the_rate_is_reported() -> None:
    site = site_report(64, 0.3, Block(32))
    assert site.rewritten, site.reason
    assert site.drawn_rate == 0.5


@pytest.mark.parametrize("units", [256, 512, 2048])
def test_auto_blocks_leave_choice(units: int) -> None:
    """At least 32 blocks on the axis, of a size that divides it."""
    masks = draws(compiled(units, 0.5), 40)["1"] != 0
    edges = (masks != masks.roll(1, 1)).any(0).nonzero().flatten()
    size = int(torch.gcd(edges, edges.roll(1)).min())
    assert units // size >= 32
    assert units % size == 0
    assert all(block_kept(row, size) for row in masks)


# When they are drawn


def seeded_masks(model: nn.Module, x: Tensor, seed: int = 7) -> oracle.Masks:
    torch.manual_seed(seed)
    with recording() as masks:
        model(x)
    return masks


def assert_same_masks(one: oracle.Masks, other: oracle.Masks) -> None:
    assert one.keys() == other.keys()
    assert one
    assert all(same(one[name], other[name]) for name in one)


@pytest.fixture
def model() -> nn.Module:
    return dropfx.compile(CASES["mlp"].make(), min_speedup=0)


@pytest.fixture
def x() -> Tensor:
    return CASES["mlp"].call(4)[0][0]


def test_manual_seed_reproduces_even_the_tracing_call(model: nn.Module, x: Tensor) -> None:
    first = seeded_masks(model, x)
    assert_same_masks(seeded_masks(model, x), first)
    assert not same(seeded_masks(model, x, seed=8)["2"], first["2"])


def test_generator_state_reproduces(model: nn.Module, x: Tensor) -> None:
    model(x)
    state = torch.get_rng_state()
    with recording() as first:
        model(x)
    torch.set_rng_state(state)
    with recording() as again:
        model(x)
    assert_same_masks(first, again)


def test_each_forward_draws_anew(model: nn.Module, x: Tensor) -> None:
    with dropfx.testing.record() as recorded:
        for _ in range(5):
            model(x)
    assert len(recorded) == 5
    for name in ("2", "5"):
        assert len({tuple(masks[name].flatten().tolist()) for masks in recorded}) == 5


def test_draw_does_not_depend_on_the_call(model: nn.Module, x: Tensor) -> None:
    """Batch size, gradient mode, a copy or another compilation do not change the draw."""
    first = seeded_masks(model, x)
    assert_same_masks(seeded_masks(model, x[:1]), first)
    with torch.no_grad():
        assert_same_masks(seeded_masks(model, x), first)
    assert_same_masks(seeded_masks(copy.deepcopy(model), x), first)
    assert_same_masks(seeded_masks(dropfx.compile(CASES["mlp"].make(), min_speedup=0), x), first)


def test_one_number_a_forward(model: nn.Module, x: Tensor) -> None:
    """However many sites; the tracing call as any other."""
    for _ in range(3):
        torch.manual_seed(5)
        model(x).sum().backward()
        after = torch.get_rng_state()
        torch.manual_seed(5)
        torch.empty((), dtype=torch.int64).random_()
        assert torch.equal(after, torch.get_rng_state())


def test_other_generators_are_not_touched(model: nn.Module, x: Tensor) -> None:
    state = random.getstate()
    for _ in range(2):
        model(x)
    assert random.getstate() == state


def test_compile_and_explain_take_no_numbers(x: Tensor) -> None:
    state, python_state = torch.get_rng_state(), random.getstate()
    model = CASES["mlp"].make()
    dropfx.explain(model, x)
    dropfx.compile(model, example_inputs=(x,), min_speedup=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state


def test_ranks_seeded_alike_draw_apart(model: nn.Module, x: Tensor) -> None:
    distributed = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    masks = []
    for rank in range(3):
        torch.distributed.init_process_group("fake", rank=rank, world_size=3, store=distributed.FakeStore())
        try:
            masks.append(seeded_masks(model, x))
            assert_same_masks(seeded_masks(model, x), masks[-1])
        finally:
            torch.distributed.destroy_process_group()
    assert not same(masks[0]["2"], masks[1]["2"])
    assert not same(masks[1]["2"], masks[2]["2"])


def test_samples_of_a_batch_share_the_draw(model: nn.Module) -> None:
    """One group: what is dropped is dropped for every row."""
    model.eval()
    model[2].train()
    x, seen = torch.rand(16, 64), []
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    dropped = seen[0] == 0
    with torch.no_grad():
        live = F.relu(model[0](x)) > 0
    for column in range(dropped.shape[1]):
        assert dropped[live[:, column], column].unique().numel() <= 1
