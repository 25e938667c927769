"""Groups: rows in contiguous chunks with a draw each; promise 2 with masks that differ along the leading axis."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropfx
from dropfx.patterns import Block, Row
from tests.catalogue import CASES
from tests.catalogue.case import check_case, check_step, mlp, pair, recording
from tests.catalogue.test_equivalence import FAMILIES, SAMPLE, SMOOTH, every

NO_LEADING_AXIS = "mlp_one_dim"
ONE_MASK = ("locked_dropout", "locked_dropout_torchnlp", "mask_statements")  # for the whole leading axis
GROUPED = [name for name in CASES if name not in (NO_LEADING_AXIS, "cell_without_batch", *ONE_MASK)]
ONE_OF_EACH = [name for name in GROUPED if not name.startswith(FAMILIES)]


@pytest.mark.filterwarnings("ignore:.*no dropout")
@pytest.mark.parametrize("name", every(GROUPED, 8))
def test_catalogue(name: str) -> None:
    check_case(CASES[name], torch.float64, batches=(4, 3), groups=3)


@pytest.mark.filterwarnings("ignore:.*no dropout")
@pytest.mark.parametrize("pattern", ["slice", "row", Block(7), Row(max_period=5, scale="period")], ids=str)
@pytest.mark.parametrize("name", every(ONE_OF_EACH, 58))
def test_other_patterns(name: str, pattern: str | dropfx.patterns.Pattern) -> None:
    check_case(CASES[name], torch.float64, batches=(4, 3), groups=2, pattern=pattern)


@pytest.mark.parametrize("name", ONE_MASK)
def test_one_mask_for_the_leading_axis_runs_as_written(name: str) -> None:
    args, _ = CASES[name].call(4)
    (site,) = dropfx.explain(CASES[name].make(), *args, options={"groups": 2, "min_speedup": 0}).sites
    assert "one mask for its whole leading axis" in site.reason
    dropfx.testing.assert_equivalent(CASES[name].make(), *args, options={"groups": 2, "min_speedup": 0})


@pytest.mark.parametrize(("name", "groups"), list(zip(SAMPLE, itertools.cycle([2, 5]), strict=False)))
def test_ragged_and_missing_groups(name: str, groups: int) -> None:
    """Batches that groups do not divide, smaller than the number of groups, empty."""
    check_case(CASES[name], torch.float64, batches=(7, 3, 1, 0, 4), groups=groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SMOOTH)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    check_case(CASES[name], dtype, groups=2)


@pytest.mark.parametrize("name", SMOOTH)
def test_under_autocast(name: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        original, compiled = pair(CASES[name], groups=2)
        masks = check_step(original, compiled, CASES[name].call(4)[0], dtype=torch.bfloat16)
    assert set(masks) == set(CASES[name].rewritten)


@pytest.mark.parametrize("pattern", ["block", "slice", "row"])
def test_chunks_of_the_leading_axis_share_a_draw(pattern: str) -> None:
    model = dropfx.compile(mlp(64, 128, 128, 8), pattern=pattern, groups=3, min_speedup=0)
    differ = 0
    for _ in range(10):
        with recording() as masks:
            model(torch.randn(8, 5, 64))
        mask = masks["2"]
        assert mask.shape == (8, 1, 128)
        chunks = mask.tensor_split(3)
        for chunk in chunks:
            assert (chunk == chunk[:1]).all()
        differ += not torch.equal(chunks[0][0], chunks[1][0])
    assert differ >= 5 if pattern == "row" else differ == 10  # period 1 keeps all units of all groups


class Flattening(nn.Module):
    """[time, batch, units], dropped, then seen as rows, as a language model's decoder does it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.outer = nn.Linear(32, 64), nn.Dropout(0.5), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.inner(x)))
        return self.outer((2 * h).reshape(-1, 64)).view(x.size(0), x.size(1), 16)


class Transposing(Flattening):
    """The leading axis moves after the site: its consumer reads dense values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.drop(torch.tanh(self.inner(x))).transpose(0, 1))


class PerUnit(Flattening):
    """A vector over the units joins before and after the site: it has no rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(64)), nn.Parameter(torch.rand(1, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.drop(self.inner(x) * self.gain + self.shift) * self.gain)


class Reshaping(Flattening):
    """Rows become [time, batch] before the site: the leading axis is one of its own only there."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.reshape(-1, 32)).view(x.size(0), x.size(1), 64)
        return self.outer(self.drop(F.relu(h)))


class TimeFirst(Flattening):
    """A value without the leading axis is broadcast along it."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(5, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.drop(self.inner(x) + F.relu(self.positions)))


class Renamed(Flattening):
    """Rows are seen as of another first axis, whose positions may have rows of two groups, which change places."""

    def forward(self, x: Tensor) -> Tensor:
        time, batch, _ = x.shape
        h = self.inner(x).view(batch, time, 64).flip(1)
        h = self.drop(F.relu(h.view(time, batch, 64)))
        return self.outer(h.view(batch, time, 64).flip(1)).view(time, batch, 16) + self.outer(h)


class Halves(Flattening):
    """Whole positions of the leading axis are cut in two, and what lies behind them moves."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x.flip(1)], 1)
        time, batch, _ = x.shape
        h = F.relu(self.inner(x.view(2 * time, batch // 2, 32)).transpose(1, 2).transpose(1, 2))
        h = self.drop(h.reshape(time, batch, 64))
        halves = self.outer(h.view(2 * time, batch // 2, 64).permute(0, 2, 1).permute(0, 2, 1))
        return halves.view(time, batch, 16) + self.outer(h)


AROUND = [Flattening, Transposing, PerUnit, Reshaping, TimeFirst, Renamed, Halves]


@pytest.mark.parametrize("build", AROUND)
def test_axes_of_changing_lengths(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    original, compiled = build().double(), build().double()
    compiled.load_state_dict(original.state_dict())
    dropfx.compile(compiled, groups=3, min_speedup=0)
    # the graph of all sizes is made where one is a multiple of the other
    for seed, shape in enumerate([(3, 3), (5, 10), (4, 6), (6, 4), (10, 5), (7, 12)]):
        x = torch.randn(shape[0], 5 if build is TimeFirst else shape[1], 32, dtype=torch.float64)
        masks = check_step(original, compiled, (x,), dtype=torch.float64, seed=seed)
        assert set(masks) == {"drop"}


def test_rows_of_a_linear_are_the_leading_axis_times_others() -> None:
    """As transformers writes a Conv1D: both products are compact."""
    original, compiled = Reshaping().double(), Reshaping().double()
    compiled.load_state_dict(original.state_dict())
    dropfx.compile(compiled, groups=3, min_speedup=0)
    for time in (6, 7, 4):
        x = torch.randn(time, 5, 32, dtype=torch.float64)
        masks = check_step(original, compiled, (x,), dtype=torch.float64)
        assert masks["drop"].shape == (time, 1, 64)
        (site,) = dropfx.explain(compiled, x).sites
        # nobody asks for the input's gradient
        assert site.flops_compact * 2 == site.flops_dense == time * 5 * (4 * 32 + 6 * 16) * 64


@pytest.mark.parametrize("build", AROUND)
@pytest.mark.parametrize("shape", [(6, 5), (5, 5), (2, 5), (1, 5), (0, 5)])
def test_axes_around_the_site(build: type[nn.Module], shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    original, compiled = build().double(), build().double()
    compiled.load_state_dict(original.state_dict())
    dropfx.compile(compiled, groups=3, min_speedup=0)
    for seed in range(4):
        x = torch.randn(*shape, 32, dtype=torch.float64)
        masks = check_step(original, compiled, (x,), dtype=torch.float64, seed=seed)
        assert set(masks) == {"drop"}


@pytest.mark.parametrize("build", [Flattening, Reshaping])
def test_sizes_that_agree_by_chance_in_the_trace(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    original, compiled = build().double(), build().double()
    compiled.load_state_dict(original.state_dict())
    dropfx.compile(compiled, groups=2, min_speedup=0, example_inputs=(torch.randn(5, 5, 32, dtype=torch.float64),))
    for time, batch in [(5, 5), (5, 3), (3, 5), (64, 32)]:
        check_step(original, compiled, (torch.randn(time, batch, 32, dtype=torch.float64),), dtype=torch.float64)


def test_second_derivative() -> None:
    model = dropfx.compile(mlp(8, 16, 16, 3).double(), groups=2, min_speedup=0)
    weight = model[3].weight

    def penalty(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        (gradient,) = torch.autograd.grad(model(x).tanh().sum(), weight, create_graph=True)
        return gradient.square().sum()

    assert torch.autograd.gradcheck(penalty, torch.randn(5, 8, dtype=torch.float64, requires_grad=True))


def test_input_without_leading_axis_runs_as_written() -> None:
    report = dropfx.explain(mlp(64, 128, 8), torch.randn(64), options={"groups": 2, "min_speedup": 0})
    assert [(s.rewritten, "leading axis" in s.reason) for s in report.sites] == [(False, True)]


@pytest.mark.parametrize("groups", [0, -1, 1.5, "times", True, None])
def test_bad_groups(groups: object) -> None:
    with pytest.raises(dropfx.InvalidOption, match="groups"):
        dropfx.compile(mlp(64, 128, 8), groups=groups)


def test_groups_cost_in_the_plan() -> None:
    """Each group gathers the weights anew: with many groups of few rows the sites are left alone."""
    net, x = mlp(1024, 1024, 1024, 8), torch.randn(64, 1024)
    assert all(site.rewritten for site in dropfx.explain(net, x).sites[:1])
    assert not any(site.rewritten for site in dropfx.explain(net, x, options={"groups": 64}).sites)
