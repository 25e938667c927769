"""The device cost table: rows that can be planned with, and the formulas that read them."""

import dataclasses
import itertools
import math

import pytest
import torch

from dropfx.graph.device_costs import DEVICES, DeviceCosts, costs_of

TABLE = DeviceCosts(flops={4: 1000.0, 2: 4000.0}, bytes=100.0, random=10.0, launch=1.0)
"""Round figures, so that expected seconds can be written down."""

each_row = pytest.mark.parametrize("row", DEVICES.values(), ids=DEVICES.keys())


@each_row
def test_figures_are_positive_and_finite(row: DeviceCosts) -> None:
    figures = [*row.flops.values(), row.bytes, row.random, row.launch]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)


@each_row
def test_a_gather_in_the_product_is_not_free(row: DeviceCosts) -> None:
    assert 0 < row.fused <= 1


@each_row
def test_products_are_known_for_every_size_of_a_float(row: DeviceCosts) -> None:
    assert row.flops.keys() == {2, 4, 8}


@each_row
def test_double_precision_is_not_faster_than_single(row: DeviceCosts) -> None:
    assert row.flops[8] <= row.flops[4]


@each_row
def test_smaller_products_and_copies_never_cost_more(row: DeviceCosts) -> None:
    sizes = [1, 64, 1024, 8192]
    for size, larger in itertools.pairwise(sizes):
        assert row.gemm(size, 256, 256) <= row.gemm(larger, 256, 256)
        assert row.gemm(256, size, 256) <= row.gemm(256, larger, 256)
        assert row.gemm(256, 256, size) <= row.gemm(256, 256, larger)
        assert row.move(size) < row.move(larger)
        assert row.dropout(size) < row.dropout(larger)


@pytest.mark.parametrize(("device", "row"), [("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda")])
def test_device_resolves_to_its_class(device: str, row: str) -> None:
    assert costs_of(torch.device(device)) is DEVICES[row]


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_unknown_device_is_taken_for_a_gpu(device: str) -> None:
    assert costs_of(torch.device(device)) is DEVICES["cuda"]


def test_rows_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TABLE.launch = 0.0  # type: ignore[misc]


def test_product_takes_its_arithmetic_where_that_is_longer() -> None:
    assert TABLE.gemm(100, 100, 100) == 1 + 2 * 100**3 / 1000  # traffic: 1200 s


def test_product_takes_its_traffic_where_that_is_longer() -> None:
    assert TABLE.gemm(1, 100, 100) == 1 + (100 + 100 * 100 + 100) * 4 / 100  # arithmetic: 20 s


def test_product_runs_at_the_rate_of_its_dtype() -> None:
    assert TABLE.gemm(1000, 1000, 1000, itemsize=2) == 1 + 2 * 1000**3 / 4000


def test_dtype_without_a_rate_of_its_own_runs_at_single_precision() -> None:
    assert TABLE.gemm(1000, 1000, 1000, itemsize=1) == 1 + 2 * 1000**3 / 1000


def test_move_reads_and_writes_once_by_default() -> None:
    assert TABLE.move(50) == 1 + 50 * 4 * 2 / 100
    assert TABLE.move(50, itemsize=8, passes=1) == 1 + 50 * 8 / 100


def test_dropout_draws_a_mask_and_multiplies_twice() -> None:
    assert TABLE.dropout(50) == 50 / 10 + 2 * TABLE.move(50, passes=3)
