"""Masks made by hand under both front ends: exact given the draw, one draw for what shares one, and turned off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import dropfx
from tests.catalogue import CASES
from tests.frontend.steps import FRONT_ENDS, captured, check, eager, one_backward

BOTH = {"compile": eager, "backend": captured}
SITE = "drop:bernoulli_1"


def model_of(name: str) -> nn.Module:
    return CASES[name].make(torch.float64)


X = torch.randn(6, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("name", ["rnn_dropout", "locked_dropout_torchnlp", "mask_in_place", "mask_used_in_a_loop"])
def test_exact_given_the_draw(name: str, front_end: str) -> None:
    original = model_of(name)
    (masks,) = check(original, FRONT_ENDS[front_end](original), one_backward, X, sites={SITE})
    assert masks[SITE].shape == (96,)


@pytest.mark.parametrize("front_end", BOTH)
def test_groups_of_samples_draw_apart(front_end: str) -> None:
    original = model_of("rnn_dropout")
    (masks,) = check(original, BOTH[front_end](original, groups=2), one_backward, X, sites={SITE})
    assert masks[SITE].shape == (6, 1, 96)
    assert not torch.equal(masks[SITE][0], masks[SITE][-1])


@pytest.mark.parametrize("front_end", BOTH)
def test_one_mask_for_the_leading_axis_is_not_split_in_groups(front_end: str) -> None:
    original = model_of("locked_dropout_torchnlp")
    compiled = BOTH[front_end](original, groups=2)
    with dropfx.testing.record() as masks:
        torch.manual_seed(1)
        got = compiled(X)
    assert not any(masks)
    torch.manual_seed(1)
    if front_end == "compile":  # takes no number where nothing is drawn
        torch.testing.assert_close(got, original(X))


@pytest.mark.parametrize("front_end", BOTH)
@pytest.mark.parametrize("options", [{}, {"min_speedup": 1e9}], ids=["rewritten", "as written"])
def test_disabled(options: dict[str, Any], front_end: str) -> None:
    """Also where it is the first call, and where the cost model leaves the mask as it is."""
    original = model_of("rnn_dropout")
    compiled = BOTH[front_end](original, **options)
    for _ in range(2):
        with dropfx.disabled():
            got = compiled(X)
        torch.testing.assert_close(got, original.eval()(X))
        assert not torch.equal(compiled(X), compiled(X))


class Partly(nn.Module):
    """The trace goes around the part that asks the data."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.asks = model_of("rnn_dropout"), Asks()

    def forward(self, x: Tensor) -> Tensor:
        return self.asks(self.drop(x))


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.drop = nn.Linear(16, 64).double(), model_of("rnn_dropout_newer")

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.lin(x)) if bool(x.isfinite().all()) else x


def test_disabled_reaches_parts_that_run_as_written() -> None:
    original = Partly()
    compiled = eager(original)
    with dropfx.disabled():
        got = compiled(X)
    torch.testing.assert_close(got, original.eval()(X))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of("rnn_dropout")

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("front_end", BOTH)
def test_checkpoint(front_end: str) -> None:
    original = Checkpointed()
    check(original, BOTH[front_end](original), one_backward, X, sites={f"inner.{SITE}"})
    with dropfx.disabled():
        got = BOTH[front_end](original)(X)
    torch.testing.assert_close(got, original.eval()(X))


class Changing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.lin2, self.p = nn.Linear(64, 96).double(), nn.Linear(96, 16).double(), 0.5

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.lin1(x))
        return self.lin2(h * h.new_empty(h.shape[0], 1, 96).bernoulli_(1 - self.p).div_(1 - self.p))


def test_a_changed_rate_is_followed() -> None:
    compiled = eager(Changing())
    for p in (0.5, 0.25, 0.75):
        compiled.p = p
        with dropfx.testing.record() as masks:
            compiled(X)
        assert (masks[0][":bernoulli_1"] == 0).double().mean() == p


@pytest.mark.parametrize("front_end", BOTH)
def test_rate_and_scale(front_end: str) -> None:
    compiled = BOTH[front_end](model_of("rnn_dropout"))
    with dropfx.testing.record() as masks:
        for _ in range(100):
            compiled(X[:2])
    drawn = torch.stack([frame[SITE] for frame in masks])
    assert set(drawn.unique().tolist()) == {0.0, 2.0}
    assert torch.all((drawn.mean(0) - 1).abs() < 0.5)  # 5 standard deviations


def test_equivalence_is_checked_with_the_masks_in_place() -> None:
    for name in ("rnn_dropout", "locked_dropout"):
        dropfx.testing.assert_equivalent(model_of(name), X, options={"min_speedup": 0})
        dropfx.testing.assert_equivalent(model_of(name), X, options={"min_speedup": 0, "groups": 2})
