"""Promise 2: given the draw, a compiled model is the original with `dropout(x) := x * mask`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropfx
from dropfx.patterns import Block
from tests.catalogue import CASES
from tests.catalogue.case import check_case, check_step, mlp, pair

PATTERNS = ("block", "slice")
FAMILIES = ("before_", "after_", "hook_")  # one operation each: one dtype is enough
ONE_OF_EACH = [name for name in CASES if not name.startswith(FAMILIES)]
# rewritten whole; smooth, so that rounding in low precision can't flip a relu
SMOOTH = (
    "deep_chain",
    "linear_dropout_linear",
    "qkv",
    "embedding",
    "tied",
    "gated",
    "pre_norm_blocks",
    "shared_linear",
)
SAMPLE = (
    *SMOOTH,
    "mlp",
    "functional",
    "residual_add",
    "residual_alpha",
    "aux_head",
    "alexnet",
    "module_loops",
    "odd_widths",
)


def every(names: Sequence[str], step: int) -> list[Any]:
    """Each step-th of the names; the others are slow tests.

    What a model's graph becomes is decided before its draw is made, so patterns, dtypes and front ends meet a sample of
    the catalogue, each another one, and `block` in double precision the whole.
    """
    return [pytest.param(name, marks=[pytest.mark.slow] if place % step else []) for place, name in enumerate(names)]


@pytest.mark.filterwarnings("ignore:.*no dropout")
@pytest.mark.parametrize(("place", "name"), list(enumerate(CASES)), ids=list(CASES))
def test_catalogue(place: int, name: str) -> None:
    """In every fourth the batch size changes: Dynamo captures again, but what a pass decides does not depend on it."""
    batches = CASES[name].batches
    check_case(CASES[name], torch.float64, batches=batches if place % 4 == 0 else batches[:1] * 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no dropout")
@pytest.mark.parametrize("name", [name for place, name in enumerate(CASES) if place % 4])
def test_catalogue_of_changing_batches(name: str) -> None:
    check_case(CASES[name], torch.float64)


@pytest.mark.filterwarnings("ignore:.*no dropout")
@pytest.mark.parametrize("name", every(list(CASES), 30))
def test_catalogue_slice(name: str) -> None:
    check_case(CASES[name], torch.float64, pattern="slice")


@pytest.mark.filterwarnings("ignore:.*no dropout")
@pytest.mark.parametrize("name", every(ONE_OF_EACH, 14))
def test_catalogue_single_precision(name: str) -> None:
    check_case(CASES[name], torch.float32)


@pytest.mark.parametrize(("dtype", "pattern"), [(torch.bfloat16, "block"), (torch.float16, "slice")])
@pytest.mark.parametrize("name", SMOOTH)
def test_low_precision(name: str, dtype: torch.dtype, pattern: str) -> None:
    check_case(CASES[name], dtype, pattern=pattern)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SMOOTH)
def test_under_autocast(name: str, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype):
        masks = None
        case = CASES[name]
        original, compiled = pair(case)
        for step in range(2):
            args, _ = case.call(4, seed=step)
            masks = check_step(original, compiled, args, dtype=dtype, seed=step)
    assert set(masks or ()) == set(case.rewritten)


@pytest.mark.parametrize(("name", "size"), list(zip(SAMPLE, itertools.cycle([1, 7, 33]), strict=False)))
def test_explicit_block_sizes(name: str, size: int) -> None:
    """Sizes that don't divide the axis end in a shorter block, which a plan pads."""
    check_case(CASES[name], torch.float64, pattern=Block(size))


@pytest.mark.parametrize(
    "name", [*SAMPLE, "product_read_by_norm_and_linear", "scale_unit", "scale_dense", "sum_with_itself"]
)
def test_last_block_shorter_in_many_draws(name: str) -> None:
    """It is kept in some draws and dropped in others."""
    case = CASES.get(name) or CASES[f"after_{name}"]
    original, compiled = pair(case, torch.float64, pattern=Block(7))
    args, kwargs = case.call(2, torch.float64)
    for seed in range(10):
        check_step(original, compiled, args, kwargs, dtype=torch.float64, seed=seed, left_alone=case.optional)


@pytest.mark.parametrize("size", [5, 16])
def test_block_option(size: int) -> None:
    check_case(CASES["mlp"], torch.float64, block=size)


@pytest.mark.parametrize("name", SAMPLE)
def test_changing_batch_sizes(name: str) -> None:
    check_case(CASES[name], torch.float64, batches=(4, 1, 0, 7, 1, 4))


@pytest.mark.parametrize(("name", "batch"), list(zip(SAMPLE, itertools.cycle([0, 1]), strict=False)))
def test_first_batch_is_tiny(name: str, batch: int) -> None:
    check_case(CASES[name], torch.float64, batches=(batch, 4))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.25, 0.75, 0.9])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rates(p: float, pattern: str) -> None:
    original = mlp(64, 128, 128, 8, p=p).double()
    compiled = dropfx.compile(mlp(64, 128, 128, 8, p=p).double(), pattern=pattern, min_speedup=0)
    compiled.load_state_dict(original.state_dict())
    masks = check_step(original, compiled, (torch.randn(4, 64, dtype=torch.float64),), dtype=torch.float64)
    assert set(masks) == {"2", "5"}


def mlp_pair() -> tuple[nn.Module, nn.Module, Tensor]:
    original, compiled = pair(CASES["mlp"], torch.float64)
    return original, compiled, CASES["mlp"].call(6, torch.float64)[0][0]


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "reversed_rows": lambda x: x.flip(0)[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_layouts(layout: str) -> None:
    original, compiled, x = mlp_pair()
    check_step(original, compiled, (LAYOUTS[layout](x),), dtype=torch.float64, input_grad=layout != "expanded")


@pytest.mark.parametrize("name", SAMPLE)
def test_input_without_gradient(name: str) -> None:
    case = CASES[name]
    original, compiled = pair(case, torch.float64)
    args, kwargs = case.call(4, torch.float64)
    check_step(original, compiled, args, kwargs, dtype=torch.float64, input_grad=False)


@pytest.mark.parametrize("name", SAMPLE)
def test_forward_without_gradients(name: str) -> None:
    case = CASES[name]
    original, compiled = pair(case, torch.float64)
    args, kwargs = case.call(4, torch.float64)
    with torch.no_grad():
        masks = check_step(original, compiled, args, kwargs, dtype=torch.float64, input_grad=False)
    assert set(case.rewritten) <= set(masks)


@pytest.mark.parametrize("name", SAMPLE)
def test_inference_mode(name: str) -> None:
    case = CASES[name]
    original, compiled = pair(case, torch.float64)
    args, kwargs = case.call(4, torch.float64)
    with torch.inference_mode():
        check_step(original, compiled, args, kwargs, dtype=torch.float64, input_grad=False)
    check_step(original, compiled, args, kwargs, dtype=torch.float64)
