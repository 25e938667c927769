"""`row`: the kept count varies from step to step."""

from __future__ import annotations

import pytest
import torch

import dropfx
from dropfx.draws.runtime import shared
from dropfx.patterns import Row
from tests.catalogue import CASES
from tests.catalogue.case import check_case, mlp, recording
from tests.catalogue.test_equivalence import SAMPLE, SMOOTH, every


@pytest.mark.filterwarnings("ignore:.*no dropout")
@pytest.mark.parametrize("name", every(list(CASES), 31))
def test_catalogue(name: str) -> None:
    check_case(CASES[name], torch.float64, pattern="row")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SMOOTH)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    check_case(CASES[name], dtype, pattern="row")


@pytest.mark.parametrize("name", SAMPLE)
def test_batches_and_scales(name: str) -> None:
    pattern = Row(max_period=6, scale="period")
    check_case(CASES[name], torch.float64, batches=(4, 1, 0, 7), pattern=pattern)


def test_period_varies_without_another_trace() -> None:
    model = dropfx.compile(mlp(64, 128, 128, 8), pattern="row", min_speedup=0)
    model(torch.randn(4, 64))
    before, counts = shared.rewritten, set()
    for batch in range(2, 42):
        with recording() as masks:
            model(torch.randn(batch, 64)).sum().backward()
        counts.add(int((masks["2"] != 0).sum()))
    assert shared.rewritten <= before + 1  # the batch size is an input from its first change on
    assert counts == {128, 64, 43, 42}  # periods 1, 2 and 3, the last by two biases


@pytest.mark.parametrize("scale", ["global", "period"])
def test_kept_units_are_a_lattice_of_the_scale(scale: str) -> None:
    model = dropfx.compile(mlp(64, 128, 8, p=0.7), pattern=Row(scale=scale), min_speedup=0)
    for _ in range(20):
        with recording() as masks:
            model(torch.randn(4, 64))
        kept = masks["2"].nonzero().flatten()
        (period,) = set(kept.diff().tolist())
        expected = float(period) if scale == "period" else 1 / (1 - 0.7)
        torch.testing.assert_close(masks["2"][kept], torch.full((len(kept),), expected))


def test_rate_schedule_searches_anew_without_another_trace() -> None:
    model = dropfx.compile(mlp(64, 128, 8), pattern="row", min_speedup=0)
    model(torch.randn(4, 64))
    before = shared.rewritten
    for p in (0.1, 0.3, 0.7, 0.9):
        model[2].p = p
        with recording() as masks:
            model(torch.randn(4, 64))
        torch.testing.assert_close(float(masks["2"].max()), 1 / (1 - p), rtol=1e-6, atol=0)
    assert shared.rewritten <= before + 1  # the rate is an input from its first change on


def test_few_units_are_refused_with_a_reason() -> None:
    report = dropfx.explain(mlp(4, 4, 4, p=0.9), torch.randn(3, 4), options={"pattern": "row", "min_speedup": 0})
    assert not report.sites[0].rewritten
    assert "periods up to 4 drop at most 0.75" in report.sites[0].reason
