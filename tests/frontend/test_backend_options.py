"""The entry point and its options: what a user writes, and what they read when it is wrong."""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

import dropfx
import dropfx.frontend.dynamo_backend
from dropfx.patterns import Block
from tests.catalogue.case import mlp
from tests.frontend.steps import captured, check, one_backward

ROOT = pathlib.Path(__file__).resolve().parents[2]

BY_NAME = """
import sys, torch
from torch import nn
model = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Dropout(0.5), nn.Linear(96, 8))
assert "dropfx" in torch._dynamo.list_backends()
compiled = torch.compile(model, backend="dropfx", options={"inner": "eager", "min_speedup": 0, "pattern": "slice"})
compiled(torch.randn(4, 48)).sum().backward()
import dropfx
with dropfx.testing.record() as masks:
    compiled(torch.randn(4, 48))
assert set(masks[0]) == {"2"}, masks
"""


def test_by_name_without_an_import() -> None:
    """In a new process, which never imports dropfx before it compiles."""
    done = subprocess.run([sys.executable, "-c", BY_NAME], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "block", "block": 8, "groups": 2, "lowering": "aten", "min_speedup": 0.0},
        {"pattern": Block(8)},
        {"pattern": "slice", "lowering": "auto"},
        {"pattern": "row"},
    ],
    ids=str,
)
def test_options_of_compile(options: dict[str, Any]) -> None:
    original = mlp(48, 96, 8, activation=nn.Tanh).double()
    masks = check(original, captured(original, **options), one_backward, torch.randn(6, 48).double(), sites={"2"})
    assert masks[0]["2"].shape == ((6, 96) if "groups" in options else (96,))


WRONG: list[tuple[dict[str, Any], str | None, tuple[str, ...]]] = [
    # options, mode -> words of the message: the argument, what came, what is accepted
    ({"patern": "block"}, None, ("'patern'", "inner_options", "did you mean 'pattern'")),
    ({"iner": "eager"}, None, ("'iner'", "did you mean 'inner'")),
    ({"example_inputs": 3}, None, ("'example_inputs'", "inner_options")),
    ({"pattern": "rows"}, None, ("pattern", "'rows'", "'row'")),
    ({"block": -1}, None, ("block", "-1", "'auto'", ">= 1")),
    ({"groups": 0}, None, ("groups", "0", ">= 1")),
    ({"min_speedup": "fast"}, None, ("min_speedup", "'fast'", ">= 0")),
    ({"lowering": "cuda"}, None, ("lowering", "'cuda'", "'aten'")),
    ({"inner": "nothing"}, None, ("inner", "'nothing'", "'inductor', 'aot_eager', 'eager'")),
    ({"inner": ["eager"]}, None, ("inner", "['eager']", "'inductor', 'aot_eager', 'eager'")),
    ({"inner_options": 3}, None, ("inner_options", "3", "a dict")),
    ({"inner": "eager", "inner_options": {"max_autotune": True}}, None, ("inner_options", "max_autotune", "'eager'")),
    ({"inner_options": {"max_autotun": True}}, None, ("inner_options", "'max_autotun'", "did you mean 'max_autotune'")),
    ({"inner_options": {"max_autotune": "yes"}}, None, ("inner_options", "'yes'", "should be bool")),
    ({3: 4}, None, ("options", "{3: 4}", "inner_options")),
    ([("inner", "eager")], None, ("options", "[('inner', 'eager')]", "dict")),  # type: ignore[list-item]
    ({}, "fast", ("mode", "'fast'", "'reduce-overhead'")),
]


@pytest.mark.parametrize(("options", "mode", "words"), WRONG, ids=str)
def test_wrong_options_name_themselves(options: dict[str, Any], mode: str | None, words: tuple[str, ...]) -> None:
    compiled = torch.compile(mlp(48, 96, 8), backend="dropfx", options=options or None, mode=mode)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(torch.randn(4, 48))
    assert isinstance(caught.value.inner_exception, dropfx.errors.InvalidOption)
    shown = str(caught.value)
    assert "backend='dropfx' raised:\nInvalidOption: " in shown
    assert all(word in shown for word in words), shown
    assert len(shown) < 1000


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_mode_is_inductors(inner: str) -> None:
    """torch.compile itself refuses a mode beside options; a partial of the backend gets past it."""
    backend = functools.partial(dropfx.frontend.dynamo_backend.backend, options={"inner": inner})
    compiled = torch.compile(mlp(48, 96, 8), backend=backend, mode="reduce-overhead")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=f"mode: got 'reduce-overhead'.*'{inner}'"):
        compiled(torch.randn(4, 48))


def test_wrong_options_show_in_eval_too() -> None:
    compiled = torch.compile(mlp(48, 96, 8).eval(), backend="dropfx", options={"inner": "nothing"})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="inner"):
        compiled(torch.randn(4, 48))


def test_suppressed_errors_run_as_written() -> None:
    """Dynamo's own switch turns a wrong option into a model that is not compiled."""
    compiled = torch.compile(mlp(48, 96, 8), backend="dropfx", options={"inner": "nothing"})
    with torch._dynamo.config.patch(suppress_errors=True):
        assert compiled(torch.randn(4, 48)).shape == (4, 8)
