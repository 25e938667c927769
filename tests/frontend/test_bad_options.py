"""Bad options get a clear typed error that names the option; the model is untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dropfx
from dropfx.patterns import Block
from tests.catalogue import CASES
from tests.catalogue.case import check_step, mlp, pair, recording
from tests.promises.untouched import example_mlp, untouched


def refused(error: type[Exception], match: str, **options: Any) -> None:
    """Both `compile` and `explain` refuse the options with a DropfxError that is an `error`."""
    model = example_mlp()
    with untouched(model):
        with pytest.raises(dropfx.DropfxError, match=match) as caught:
            dropfx.compile(model, **options)
        assert isinstance(caught.value, error)
        with pytest.raises(dropfx.DropfxError, match=match) as caught:
            dropfx.explain(model, torch.randn(2, 64), options=options)
        assert isinstance(caught.value, error)


@pytest.mark.parametrize("pattern", ["blocks", "", "BLOCK", 3, None, dropfx.patterns.Block, nn.Dropout(0.5)])
def test_unknown_pattern(pattern: object) -> None:
    refused((ValueError, TypeError), "pattern", pattern=pattern)


@pytest.mark.parametrize("block", [0, -1, 1.5, "big", None, True, [16]])
def test_bad_block(block: object) -> None:
    refused((ValueError, TypeError), "block", block=block)


@pytest.mark.parametrize("size", [0, -4, 2.5, "small", None, True])
def test_bad_size_of_a_block_pattern(size: object) -> None:
    with pytest.raises(dropfx.DropfxError, match=r"size|block") as caught:
        Block(size)
    assert isinstance(caught.value, (ValueError, TypeError))


@pytest.mark.parametrize("groups", [0, -1, 1.5, "many", None, True])
def test_bad_groups(groups: object) -> None:
    refused((ValueError, TypeError), "groups", groups=groups)


@pytest.mark.parametrize("recipe", ["slow", "", 1, True])
def test_bad_recipe(recipe: object) -> None:
    refused((ValueError, TypeError), "recipe", recipe=recipe)


def test_recipe_in_place_of_groups() -> None:
    refused((ValueError, TypeError), "recipe", recipe="fast", groups=4)


@pytest.mark.parametrize("lowering", ["cuda", "", None, 1])
def test_bad_lowering(lowering: object) -> None:
    refused((ValueError, TypeError), "lowering", lowering=lowering)


@pytest.mark.parametrize("min_speedup", [-1, float("nan"), "fast", None, True, -0.5])
def test_bad_min_speedup(min_speedup: object) -> None:
    refused((ValueError, TypeError), "min_speedup", min_speedup=min_speedup)


def test_triton_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(RuntimeError, "lowering", lowering="triton")


@pytest.mark.parametrize("option", ["patern", "size", "rate", "inner"])
def test_unknown_option(option: str) -> None:
    refused((ValueError, TypeError), option, **{option: 1})


def test_misspelt_option_is_suggested() -> None:
    refused((ValueError, TypeError), "pattern", patern="slice")


@pytest.mark.parametrize("options", ["slice", [("pattern", "slice")], 3])
def test_options_of_explain_must_be_a_dict(options: object) -> None:
    with pytest.raises(dropfx.DropfxError, match="options"):
        dropfx.explain(example_mlp(), torch.randn(2, 64), options=options)


@pytest.mark.parametrize("lowering", ["auto", "aten"])
def test_reference_lowering_works(lowering: str) -> None:
    original, compiled = pair(CASES["mlp"], torch.float64, lowering=lowering)
    assert check_step(original, compiled, CASES["mlp"].call(4, torch.float64)[0], dtype=torch.float64)


def test_block_larger_than_the_axis() -> None:
    """The narrow site runs as written, with the reason; the wide one is rewritten."""
    model, x = mlp(64, 96, 256, 8), torch.randn(3, 64)
    narrow, wide = dropfx.explain(model, x, options={"block": 128, "min_speedup": 0}).sites
    assert not narrow.rewritten
    assert "block" in narrow.reason
    assert wide.rewritten, wide.reason
    dropfx.compile(model, block=128, min_speedup=0)
    with recording() as masks:
        model(x)
    assert set(masks) == {"5"}


def test_block_as_large_as_the_axis() -> None:
    """One block can't be kept and dropped at once."""
    (site,) = dropfx.explain(mlp(64, 96, 8), torch.randn(3, 64), options={"block": 96, "min_speedup": 0}).sites
    assert not site.rewritten
    assert "block" in site.reason
