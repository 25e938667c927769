"""Data-parallel training on two processes: promise 2 on the concatenated batch, promise 4 for ranks."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import harness

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("no gloo", allow_module_level=True)

pytestmark = pytest.mark.xdist_group("distributed")  # one worker: all checks share a run

QUICK = ("checks_draws", "checks_ddp", "checks_fsdp", "checks_tensor_parallel", "checks_dynamo")
SLOW = ("checks_slow",)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> harness.Results:
    return harness.run(QUICK, tmp_path_factory.mktemp("quick"), timeout=300)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> harness.Results:
    return harness.run(SLOW, tmp_path_factory.mktemp("slow"), timeout=900)


@pytest.mark.parametrize("check", harness.names_of(*QUICK))
def test_quick(quick: harness.Results, check: str) -> None:
    assert quick[check] == [""] * harness.WORLD, "\n".join(quick[check])


@pytest.mark.slow
@pytest.mark.parametrize("check", harness.names_of(*SLOW))
def test_slow(slow: harness.Results, check: str) -> None:
    assert slow[check] == [""] * harness.WORLD, "\n".join(slow[check])
