"""Row sites: every spelling of stochastic depth, what runs on kept rows, and what must not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import dropfx
from tests.catalogue.case import check_step

P, KEEP = 0.3, 0.7


def shape(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], *[1] * (x.dim() - 1))


def timm(m: nn.Module, x: Tensor) -> Tensor:
    mask = x.new_empty(shape(x)).bernoulli_(KEEP)
    mask.div_(KEEP)
    return x * mask


def without_scale(m: nn.Module, x: Tensor) -> Tensor:
    return x * x.new_empty(shape(x)).bernoulli_(KEEP)


def torchvision(m: nn.Module, x: Tensor) -> Tensor:
    noise = torch.empty(shape(x), dtype=x.dtype, device=x.device)
    noise = noise.bernoulli_(KEEP)
    return x * noise.div_(KEEP)


def transformers(m: nn.Module, x: Tensor) -> Tensor:
    mask = KEEP + torch.rand(shape(x), dtype=x.dtype, device=x.device)
    mask.floor_()
    return x.div(KEEP) * mask


def below(m: nn.Module, x: Tensor) -> Tensor:
    return x * (torch.rand(shape(x), dtype=x.dtype) < KEEP) / KEEP


def above(m: nn.Module, x: Tensor) -> Tensor:
    return torch.where(torch.rand(shape(x), dtype=x.dtype) >= P, x / KEEP, 0.0)


def of_ones(m: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(torch.ones(shape(x), dtype=x.dtype), P) * x


def probabilities(m: nn.Module, x: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.full(shape(x), KEEP, dtype=x.dtype)) * (1 / KEEP)


IDIOMS = [timm, without_scale, torchvision, transformers, below, above, of_ones, probabilities]


Idiom = Callable[[nn.Module, Tensor], Tensor]


def drop_path(idiom: Idiom) -> nn.Module:
    """A module whose forward drops so."""
    made: type[nn.Module] = type("DropPath", (nn.Module,), {"forward": idiom})
    return made()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, units = x.shape
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, 4, units // 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, units))


class Windows(nn.Module):
    """As Swin's: each sample has several windows, side by side in the leading axis."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)
        self.register_buffer("bias", torch.randn(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows, _, units = x.shape
        windows = x.view(rows, 4, 2, units).reshape(rows * 4, 2, units)
        mixed = self.mix(windows).view(rows, 4, 2, units) + self.bias
        return mixed.reshape(rows * 4, 2, units).view(rows, 8, units)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.over, self.norm = nn.Conv1d(32, 32, 3, padding=1, groups=32), nn.GroupNorm(2, 32)
        self.up, self.down, self.gamma = nn.Linear(32, 64), nn.Linear(64, 32), nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.over(x.transpose(1, 2))).transpose(1, 2)
        return self.down(F.gelu(self.up(y))) * self.gamma


def mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "attention": Attention,
    "windows": Windows,
    "convolution": Convolution,
}


class Residual(nn.Module):
    def __init__(self, branch: Callable[[], nn.Module], drop: Idiom, checkpoint: bool = False):
        super().__init__()
        self.branches = nn.ModuleList([branch() for _ in range(2)])
        self.drops, self.checkpoint = nn.ModuleList([drop_path(drop) for _ in range(2)]), checkpoint

    def block(self, branch: nn.Module, drop: nn.Module, x: Tensor) -> Tensor:
        return x + (drop(branch(x)) if self.training else branch(x))

    def forward(self, x: Tensor) -> Tensor:
        for branch, drop in zip(self.branches, self.drops, strict=True):
            if self.checkpoint:
                x = torch.utils.checkpoint.checkpoint(self.block, branch, drop, x, use_reentrant=False)
            else:
                x = self.block(branch, drop, x)
        return x


def batch(rows: int = 6) -> Tensor:
    return torch.randn(rows, 8, 32, dtype=torch.float64, requires_grad=True)


def compiled(original: nn.Module, inner: str = "", **options: Any) -> nn.Module:
    torch._dynamo.reset()
    model = copy.deepcopy(original)
    if inner:
        model.compile(backend="dropfx", options={"inner": inner, "min_speedup": 0, **options})
        return model
    return dropfx.compile(model, min_speedup=0, **options)


@pytest.mark.parametrize("drop", [idiom for idiom in IDIOMS if idiom is not below])
@pytest.mark.parametrize("inner", ["", "aot_eager"])
def test_every_spelling(drop: Idiom, inner: str) -> None:
    original = Residual(mlp, drop).double()
    model = compiled(original, inner)
    for seed in range(3):
        masks = check_step(original, model, (batch(),), dtype=torch.float64, seed=seed)
        assert len(masks) == 2
        for mask in masks.values():
            assert mask.shape == (6, 1, 1)


def test_numbers_below_a_threshold() -> None:
    """Which the other oracle takes for dropped rows."""
    model = Residual(mlp, below)
    dropfx.testing.assert_equivalent(model, batch().float(), options={"min_speedup": 0})
    assert all(site.rewritten for site in dropfx.explain(model, batch().float(), options={"min_speedup": 0}).sites)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("inner", ["", "aot_eager"])
def test_every_kind_of_layer(branch: str, inner: str) -> None:
    original = Residual(BRANCHES[branch], timm).double()
    model = compiled(original, inner)
    for seed, rows in enumerate((6, 6, 5, 7, 2)):
        masks = check_step(original, model, (batch(rows),), dtype=torch.float64, seed=seed)
        assert len(masks) == 2


class Nested(nn.Module):
    """A branch with a branch inside, both of which drop rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Residual(mlp, timm), mlp()
        self.drop = drop_path(timm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.inner(self.outer(x)))


@pytest.mark.parametrize("inner", ["", "aot_eager"])
def test_a_branch_in_a_branch(inner: str) -> None:
    original = Nested().double()
    model = compiled(original, inner)
    for seed, rows in enumerate((6, 4, 5)):
        masks = check_step(original, model, (batch(rows),), dtype=torch.float64, seed=seed)
        assert {"inner.drops.0:bernoulli_1", "inner.drops.1:bernoulli_1"} <= set(masks)


class ByLayout(nn.Module):
    """A view that PyTorch accepts for the layout of what is written into alone: channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.drop = nn.Linear(16, 16), drop_path(torchvision)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.drop(self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        branch += x
        return branch.permute(0, 2, 3, 1).view(x.size(0), -1)


@pytest.mark.parametrize("inner", ["", "aot_eager"])
def test_values_keep_their_layout(inner: str) -> None:
    original = ByLayout().double()
    model = compiled(original, inner)
    for seed in range(2):
        x = torch.randn(6, 16, 3, 3, dtype=torch.float64)
        assert len(check_step(original, model, (x,), dtype=torch.float64, seed=seed)) == 1


class SideInput(nn.Module):
    """A value of each sample comes into the branch late, behind one that asks for the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.side, self.drop = (
            nn.Linear(32, 64),
            nn.Linear(64, 32),
            nn.Linear(32, 64),
            drop_path(timm),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        late = torch.tanh(self.side(x.mean(1))).view(h.size(0), 1, 64)
        return x + self.drop(self.down(h * late)) + late.sum()


class WrittenBehind(nn.Module):
    """The branch reads a value that is written to in place between two of its readers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(32, 32), nn.Linear(32, 32), drop_path(transformers)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            memory = torch.empty_like(x).copy_(x)
        first = self.first(x + memory)
        memory.copy_(x.detach() * 2)
        return x + self.drop(first + self.second(x - memory))


@pytest.mark.parametrize("model", [SideInput, WrittenBehind])
def test_values_from_outside(model: type[nn.Module]) -> None:
    original = model().double()
    ours = compiled(original)
    for seed, rows in enumerate((6, 4, 5)):
        masks = check_step(original, ours, (batch(rows),), dtype=torch.float64, seed=seed)
        assert len(masks) == 1


class DropsInside(nn.Module):
    """timm's MLP with its own dropouts before the mask of rows; `few` has too few units for a pattern."""

    def __init__(self, windows: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.inside, self.last, self.few = nn.Dropout(0.5), nn.Dropout(0.25), nn.Dropout(0.5)
        self.narrow, self.wide, self.off = nn.Linear(32, 3), nn.Linear(3, 32), nn.Dropout(0.0)
        self.drop, self.windows = drop_path(timm), windows

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        h = self.up(self.norm(x))
        h = h.view(rows * 2, tokens // 2, 64) if self.windows else h
        h = self.off(self.inside(F.gelu(h)))
        h = self.down(h.view(rows, tokens, 64)) + self.wide(self.few(self.narrow(x)))
        h = self.last(h)
        return x + (self.drop(h) if self.training else h)


@pytest.mark.parametrize("options", [{"groups": 1}, {"groups": 2}, {"groups": 3, "pattern": "slice"}, {}], ids=str)
@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("inner", ["", "aot_eager"])
def test_dropouts_inside_of_a_branch(inner: str, windows: bool, options: dict[str, Any]) -> None:
    """Theirs are draws of units on the kept rows; what runs as written draws the masks of all rows, as PyTorch does."""
    torch.manual_seed(0)
    original = DropsInside(windows).double()
    model = compiled(original, inner, **options)
    for seed, rows in enumerate((6, 6, 9)):
        left = ("few",)
        masks = check_step(original, model, (batch(rows),), dtype=torch.float64, seed=seed, left_alone=left)
        assert set(masks) == {"inside", "last", "drop:bernoulli_1"}


def test_explain_says_that_the_branch_and_its_dropouts_are_rewritten() -> None:
    report = dropfx.explain(DropsInside(), batch().float(), options={"min_speedup": 0})
    assert {site.name: site.pattern for site in report.sites if site.rewritten} == {
        "drop:bernoulli_1": "rows",
        "inside": "block",
        "last": "block",
    }


def test_disabled_turns_off_what_is_inside() -> None:
    original = DropsInside()
    model, x = compiled(original), batch().float()
    model(x)
    with dropfx.disabled():
        got = model(x)
    torch.testing.assert_close(got, original.eval()(x))


def test_inductor() -> None:
    original = Residual(mlp, timm)
    model = compiled(original, "inductor")
    for seed in range(4):
        masks = check_step(original, model, (torch.randn(6, 8, 32),), seed=seed)
        assert len(masks) == 2


def test_checkpoints() -> None:
    model = Residual(Attention, timm, checkpoint=True)
    x = batch().float()
    dropfx.testing.assert_equivalent(model, x, options={"min_speedup": 0})
    assert [site.pattern for site in dropfx.explain(model, x, options={"min_speedup": 0}).sites] == ["rows"] * 2


def test_the_branch_runs_on_kept_rows_alone() -> None:
    model = compiled(Residual(mlp, timm))
    x = torch.randn(6, 8, 32)
    model(x)
    seen: set[int] = set()

    def note(saved: Tensor) -> Tensor:
        if saved.shape[-1:] == (64,):  # within the branch
            seen.add(saved.numel() // (8 * 64))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        model(x)
    assert seen & {4, 5}
    assert 6 not in seen


def test_explain_counts_the_products_of_the_branch() -> None:
    report = dropfx.explain(Residual(mlp, timm), torch.randn(10, 8, 32), options={"min_speedup": 0})
    for site in report.sites:
        assert site.flops_dense == 2 * (2 * 80 * 32 * 64) * 3
        assert site.flops_compact == pytest.approx(0.7 * site.flops_dense, rel=1e-6)
        assert site.seconds_saved == report.sites[0].seconds_saved
    assert report.flops_dense == pytest.approx(sum(site.flops_dense for site in report.sites), rel=1e-6)
    assert report.flop_ratio == pytest.approx(1 / 0.7, rel=1e-6)


def test_eval_is_untouched() -> None:
    original = Residual(Attention, transformers)
    model = compiled(original)
    model(batch().float())
    x = batch().float()
    assert torch.equal(model.eval()(x), original.eval()(x))


@pytest.mark.parametrize("drop", IDIOMS)
def test_disabled_keeps_all_rows(drop: Idiom) -> None:
    original = Residual(mlp, drop)
    model = compiled(original)
    x = batch().float()
    model(x)
    with dropfx.disabled():
        got = model(x)
    torch.testing.assert_close(got, original.eval()(x))


def rarely(m: nn.Module, x: Tensor) -> Tensor:
    return x * x.new_empty(shape(x)).bernoulli_(0.2).div_(0.2)


@pytest.mark.parametrize("inner", ["", "aot_eager"])
def test_where_no_row_is_kept_one_runs_and_adds_nothing(inner: str) -> None:
    original = Residual(mlp, rarely).double()
    model, kept = compiled(original, inner), set[int]()
    for seed in range(6):
        masks = check_step(original, model, (batch(2),), dtype=torch.float64, seed=seed)
        kept |= {int(mask.count_nonzero()) for mask in masks.values()}
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert kept == {0, 1}


def test_a_batch_of_one_runs_as_written() -> None:
    original = Residual(mlp, timm).double()
    model = compiled(original)
    for rows in (4, 1, 4):
        with dropfx.testing.record() as masks:
            model(batch(rows)).sum().backward()
        assert len(masks[0] if masks else {}) == (2 if rows > 1 else 0)


# -- what must not fire ---------------------------------------------------------------------------------------------


def whole_batch(m: nn.Module, x: Tensor) -> Tensor:
    return x * x.new_empty([1] * x.dim()).bernoulli_(KEEP).div_(KEEP)


class NormalisedByBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(32, 32), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return y - y.mean(0, keepdim=True)


class InOrder(nn.Module):
    """The batch is not the outermost of the axes that a view merges."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).transpose(0, 1).reshape(-1, 32).flip(0).view(8, -1, 32).transpose(0, 1)


@pytest.mark.parametrize(
    ("branch", "drop", "reason"),
    [
        (mlp, whole_batch, "one random number decides for the whole batch"),
        (NormalisedByBatch, timm, "batch_norm is not known to keep samples apart"),
        (Centred, timm, "mean is not known to keep samples apart"),
        (InOrder, timm, "is not known to keep samples apart"),
    ],
)
def test_runs_as_written(branch: Callable[[], nn.Module], drop: Idiom, reason: str) -> None:
    original = Residual(branch, drop).double()
    report = dropfx.explain(original, batch(), options={"min_speedup": 0})
    assert [site.rewritten for site in report.sites] == [False, False]
    assert all(reason in site.reason for site in report.sites)
    assert not check_step(original, compiled(original), (batch(),), dtype=torch.float64)


def three_levels(m: nn.Module, x: Tensor) -> Tensor:
    return x * (torch.rand(shape(x), dtype=x.dtype) * 3).floor_()


def not_zero(m: nn.Module, x: Tensor) -> Tensor:
    return x * ((torch.rand(shape(x), dtype=x.dtype) < KEEP) + 0.5)


def noise(m: nn.Module, x: Tensor) -> Tensor:
    return x * torch.rand(shape(x), dtype=x.dtype)


def read_twice(m: nn.Module, x: Tensor) -> Tensor:
    mask = x.new_empty(shape(x)).bernoulli_(KEEP)
    return x * mask + mask


@pytest.mark.parametrize("drop", [three_levels, not_zero, noise, read_twice])
def test_no_mask_of_rows(drop: Idiom) -> None:
    original = Residual(mlp, drop).double()
    assert not dropfx.explain(original, batch(), options={"min_speedup": 0}).sites
    assert not check_step(original, compiled(original), (batch(),), dtype=torch.float64)


class OfFx(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) * x.new_empty((x.size(0), 1, 1)).bernoulli_(KEEP).div_(KEEP)


def test_a_graph_of_fx_does_not_know_its_batch() -> None:
    made = dropfx.rewrite(torch.fx.symbolic_trace(OfFx()), torch.randn(6, 8, 32), options={"min_speedup": 0})
    assert not [node for node in made.graph.nodes if "rows" in node.name]
    assert made(torch.randn(3, 8, 32)).shape == (3, 8, 32)
