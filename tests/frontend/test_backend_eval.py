"""Promise 1 under torch.compile: eval is the inner compiler's own, bit for bit, and switching compiles once each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

import dropfx
from tests.catalogue.case import mlp
from tests.frontend.steps import FRONT_ENDS, captured, slow

INNER = [slow("eager"), "aot_eager", slow("inductor")]


class Normed(nn.Module):
    """Sites before a norm, on a residual, and a batch norm whose statistics eval reads."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm, self.drop = mlp(48, 96, 48, activation=nn.GELU), nn.LayerNorm(48), nn.Dropout(0.5)
        self.batch, self.head = nn.BatchNorm1d(48), nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.drop(self.net(self.norm(self.batch(x)))))


def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients and the generator's state after them."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in model.parameters()), torch.get_rng_state()]


@pytest.mark.parametrize("inner", INNER)
def test_bit_equal_to_the_inner_compiler(inner: str) -> None:
    model, x = Normed(), torch.randn(6, 48)
    compiled = captured(model, inner=inner)
    compiled(x)
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in compiled.state_dict().items()})
    plain = torch.compile(copy.deepcopy(model).eval(), backend=inner)
    with dropfx.testing.record() as masks:
        ours = run(compiled.eval(), x)
    assert not masks
    assert all(torch.equal(a, b) for a, b in zip(ours, run(plain, x), strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(x), plain(x))
    with torch.inference_mode():
        assert torch.equal(compiled(x), plain(x))


def test_eval_of_a_compiled_model_is_captured_whole() -> None:
    """torch.compile on top of dropfx.compile sees the original forward in eval."""
    model, x = Normed().eval(), torch.randn(6, 48)
    plain = torch.compile(copy.deepcopy(model), backend="aot_eager")
    on_top = torch.compile(dropfx.compile(model, min_speedup=0), backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(run(on_top, x), run(plain, x), strict=True))


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_switches_compile_once_each(name: str) -> None:
    compiled, x = FRONT_ENDS[name](Normed()), torch.randn(6, 48)
    for turn in range(4):
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            compiled.train()
            with dropfx.testing.record() as masks:
                compiled(x).sum().backward()
            assert [set(frame) for frame in masks if frame] == [{"net.2", "drop"}]
            compiled.eval()
            with dropfx.testing.record() as masks:
                compiled(x).sum().backward()
            assert not any(masks)


def test_one_dropout_alone_in_eval() -> None:
    """Its own flag counts, not the model's."""
    compiled, x = captured(Normed()), torch.randn(6, 48)
    expected: list[tuple[Any, set[str]]] = [(True, {"net.2", "drop"}), (False, {"net.2"}), (True, {"net.2", "drop"})]
    for live, sites in expected:
        compiled.get_submodule("_orig_mod.drop").train(live)
        with dropfx.testing.record() as masks:
            compiled(x)
        assert set(masks[0]) == sites


def test_switches_count() -> None:
    counters.clear()
    compiled, x = captured(Normed()), torch.randn(6, 48)
    for _ in range(3):
        compiled.train()(x)
        compiled.eval()(x)
    assert counters["stats"]["unique_graphs"] == 2
