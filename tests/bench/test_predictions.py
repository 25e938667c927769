"""`dropfx bench predictions`: its cases, and what it says of them."""

from __future__ import annotations

from dropfx.bench import predictions
from dropfx.bench.predictions import ALL, DEFAULT, EAGER, Case, Result, summary_table


def test_a_case() -> None:
    found = predictions.measure(Case("mlp", 16, 32, 0.5), rounds=1)
    assert found.rewritten == 0 < found.sites
    assert found.predicted > 0
    assert {*found.seconds} == {EAGER, DEFAULT, ALL}


def test_the_summary() -> None:
    results = [
        Result(Case("mlp", 64, 16, 0.5), {}, default=0.9, everything=0.5, predicted=0.6, rewritten=1, sites=2),
        Result(Case("mlp", 64, 128, 0.5), {}, default=1.2, everything=1.2, predicted=1.2, rewritten=2, sites=2),
        Result(Case("mlp", 64, 512, 0.5), {}, default=1.4, everything=1.5, predicted=1.2, rewritten=2, sites=2),
    ]
    (row,) = zip(*(column.cells for column in summary_table(results).columns), strict=True)
    assert row == ("mlp", "0.90x", "1 of 3", "20%", "20%")
