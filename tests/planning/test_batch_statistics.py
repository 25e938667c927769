"""What a draw that rows share must not reach: statistics over these rows, however far behind units stay apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropfx
from tests.promises.both_ways import Body, check_both_ways, compiled_both_ways

Forward = Callable[[Any, Tensor], Any]


def dropped(m: Any, x: Tensor) -> Tensor:
    """A residual stream, [..., 64]."""
    return m.b(m.a(x)) + m.d(m.a(x))


def inplace(m: Any, x: Tensor) -> Tensor:
    h = m.b(m.a(x))
    h += m.d(m.a(x))
    return m.c(m.norm(h))


def standardised(m: Any, x: Tensor) -> Tensor:
    h = dropped(m, x)
    return m.c((h - h.mean(0)) / h.std(0))


def by_inverse_root(m: Any, x: Tensor) -> Tensor:
    h = dropped(m, x)
    centred = h - h.mean(0)
    return m.c(centred * (centred.square().mean(0) + 1e-5).rsqrt())


def by_root(m: Any, x: Tensor) -> Tensor:
    h = dropped(m, x)
    centred = h - h.mean(0, keepdim=True)
    return m.c(centred / ((centred**2).mean(0) + 1e-5).sqrt())


BATCH_NORMS: dict[str, Forward] = {
    "direct": lambda m, x: m.c(m.norm(m.d(m.a(x)))),
    "residual": lambda m, x: m.c(m.norm(dropped(m, x))),
    "residual_in_place": inplace,
    "not_zero_at_zero": lambda m, x: m.c(m.norm(torch.sigmoid(m.d(m.a(x))) + 1)),
    "functional": lambda m, x: m.c(F.batch_norm(dropped(m, x), None, None, training=True)),
    "split_into_heads": lambda m, x: F.batch_norm(dropped(m, x).view(-1, 8, 8), None, None, training=True),
    "part": lambda m, x: F.batch_norm(dropped(m, x).chunk(2, -1)[0], None, None, training=True),
    "reversed": lambda m, x: m.norm(dropped(m, x).flip(1)),
    "repeated": lambda m, x: m.norm(dropped(m, x)[:, :, None].expand(-1, -1, 3)),
    "joined": lambda m, x: m.norm(torch.cat([m.a(x), m.d(m.a(x))])),
    "behind_another_dropout": lambda m, x: m.norm(dropped(m, x) * F.dropout(torch.ones_like(x[:, :1]), 0.0)),
    "masked": lambda m, x: m.norm(dropped(m, x).masked_fill(x[:, :1] > 1, 0.0)),
}
OF_SEQUENCES: dict[str, Forward] = {
    "channels_second": lambda m, x: m.norm(dropped(m, x).transpose(1, 2)).transpose(1, 2),
    "rows_merged": lambda m, x: m.norm(dropped(m, x).flatten(0, 1)),
    "pooled": lambda m, x: m.norm(F.max_pool1d(dropped(m, x).transpose(1, 2), 2)),
    "depthwise": lambda m, x: m.norm(F.conv1d(dropped(m, x).transpose(1, 2), m.b.weight[:, None, :3], groups=64)),
}
OTHER_STATISTICS: dict[str, tuple[Forward, str]] = {
    "standardised": (standardised, "std"),
    "by_inverse_root": (by_inverse_root, "rsqrt"),
    "by_root": (by_root, "div"),
    "var": (lambda m, x: dropped(m, x).var(0).sum(), "var"),
    "var_mean": (lambda m, x: torch.var_mean(dropped(m, x), dim=0)[0], "var_mean"),
    "normalised": (lambda m, x: F.normalize(dropped(m, x), dim=0), "normalize"),
    "norm": (lambda m, x: dropped(m, x) / dropped(m, x).norm(dim=0), "norm"),
    "instance_norm": (lambda m, x: F.instance_norm(dropped(m, x)[None].transpose(1, 2)), "instance_norm"),
    "group_norm": (lambda m, x: F.group_norm(dropped(m, x)[None].transpose(1, 2), 32), "group_norm"),
}


def reasons(forward: Forward, x: Tensor, **options: Any) -> list[str]:
    given = {"min_speedup": 0, "groups": 1, **options}
    return [site.reason for site in dropfx.explain(Body(forward), x, options=given).sites]


def recorded(forward: Forward, x: Tensor) -> list[set[str]]:
    """The rewritten sites, compiled either way."""
    found = []
    for compiled in compiled_both_ways(Body(forward)):
        with dropfx.testing.record() as masks:
            compiled(x)
        found.append({name for frame in masks for name in frame})
    return found


@pytest.mark.parametrize("options", [{}, {"groups": 3}, {"pattern": "slice"}, {"pattern": "row"}], ids=str)
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_normalisation_is_a_reason(name: str, options: dict[str, Any]) -> None:
    assert "statistics of a batch normalisation" in reasons(BATCH_NORMS[name], torch.randn(12, 32), **options)[0]


@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_batch_normalisation_of_a_sequence_is_a_reason(name: str) -> None:
    x = torch.randn(6, 5, 32)
    assert "statistics of a batch normalisation" in reasons(OF_SEQUENCES[name], x)[0]
    assert recorded(OF_SEQUENCES[name], x) == [set(), set()]


@pytest.mark.parametrize("name", OTHER_STATISTICS)
def test_statistic_over_rows_is_a_reason(name: str) -> None:
    forward, word = OTHER_STATISTICS[name]
    reason = reasons(forward, torch.randn(12, 32))[-1]
    assert reason.startswith("a draw shared by the batch would reach")
    assert word in reason
    assert "d" not in recorded(forward, torch.randn(12, 32))[1] or name == "norm"


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_such_sites_run_as_written(name: str) -> None:
    assert recorded(BATCH_NORMS[name], torch.randn(12, 32)) == [set(), set()]


def standardised_units(m: Any, x: Tensor) -> Tensor:
    h = dropped(m, x)
    return m.c((h - h.mean(-1, True)) / h.std(-1, keepdim=True))


NO_STATISTICS: dict[str, Forward] = {
    "layer_norm": lambda m, x: m.c(m.layer_norm(dropped(m, x))),
    "layer_norm_by_hand": standardised_units,
    "batch_norm_in_eval": lambda m, x: m.c(F.batch_norm(dropped(m, x), m.norm.running_mean, m.norm.running_var)),
    "another_branch": lambda m, x: m.c(m.d(m.a(x))) + m.norm(m.b(m.a(x))).sum(),
    "linear_between": lambda m, x: m.norm(m.a(x) + m.b(m.d(m.a(x)))),
    "layer_norm_between": lambda m, x: m.norm(m.layer_norm(dropped(m, x))),
    "mean_over_rows": lambda m, x: m.c(dropped(m, x) - dropped(m, x).mean(0)),
    "one_group": lambda m, x: F.group_norm(dropped(m, x)[..., None], 1),
    "norm_of_all": lambda m, x: m.c(m.d(m.a(x))) / (1 + m.a(x).norm()),
}


@pytest.mark.parametrize("name", NO_STATISTICS)
def test_no_reason(name: str) -> None:
    x = torch.randn(12, 32, dtype=torch.float64)
    sites = {"d", "d#2"} if name == "mean_over_rows" else {"d"}
    check_both_ways(NO_STATISTICS[name], x, rewritten=sites)


def test_batch_norm_over_another_axis_keeps_no_units_apart() -> None:
    """[batch, steps, units], whose channels are the steps."""
    x = torch.randn(6, 5, 32, dtype=torch.float64)
    check_both_ways(lambda m, x: m.c(F.batch_norm(dropped(m, x), None, None, training=True)), x, rewritten={"d"})


class Channels(nn.Module):
    """Whole channels are dropped in PyTorch too: a statistic of one sample sees nothing new."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.drop, self.lin = norm, nn.Dropout1d(0.5), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.lin(x).transpose(1, 2)) + x.transpose(1, 2)
        return self.norm(h)


@pytest.mark.parametrize(
    ("norm", "rewritten"),
    [(nn.InstanceNorm1d(64), True), (nn.GroupNorm(32, 64), True), (nn.BatchNorm1d(64), False)],
    ids=lambda value: type(value).__name__,
)
def test_channels(norm: nn.Module, rewritten: bool) -> None:
    report = dropfx.explain(Channels(norm), torch.randn(6, 5, 64), options={"min_speedup": 0, "groups": 1})
    assert [site.rewritten for site in report.sites] == [rewritten], report.sites[0].reason


def test_mask_that_steps_share_reaches_no_statistic_over_steps() -> None:
    class Locked(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.a, self.b, self.dim = nn.Linear(32, 64), nn.Linear(64, 8), dim

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            mask = h.new_empty(h.size(0), 1, h.size(2)).bernoulli_(0.5).div_(0.5)
            return self.b(h * mask) + (h * mask + 1).var(self.dim).sum()

    for dim, rewritten in ((1, True), (0, False)):
        report = dropfx.explain(Locked(dim), torch.randn(6, 5, 32), options={"min_speedup": 0, "groups": 1})
        assert [site.rewritten for site in report.sites] == [rewritten]
