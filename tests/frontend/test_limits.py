"""What the backend leaves as it is, and the errors that PyTorch's own limits lead to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import dropfx
from tests.catalogue.case import mlp
from tests.frontend.steps import captured

INNER = ["eager", "aot_eager"]


class Net(nn.Module):
    """48 -> 96 -> 8 with a site between, and a forward of choice."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.inner, self.drop, self.outer, self.body = nn.Linear(48, 96), nn.Dropout(0.5), nn.Linear(96, 8), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def in_a_branch(m: Net, x: Tensor) -> Tensor:
    def dropped(x: Tensor) -> Tensor:
        return m.outer(m.drop(torch.tanh(m.inner(x))))

    def plain(x: Tensor) -> Tensor:
        return m.outer(torch.tanh(m.inner(x)))

    return torch.cond(x.sum() > 1e9, dropped, plain, (x,)) + m.outer(m.drop(m.inner(x)))


def of_a_size_known_when_it_runs(m: Net, x: Tensor) -> Tensor:
    h = m.inner(x)
    kept = h[h.sum(-1) > 0]
    return m.outer(m.drop(torch.tanh(kept))).sum() + m.outer(m.drop(h))


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("body", "site"), [(in_a_branch, "drop"), (of_a_size_known_when_it_runs, "drop#2")])
def test_left_as_written_beside_a_site(body: Any, site: str, inner: str) -> None:
    compiled = captured(Net(body).double(), inner=inner)
    x = torch.randn(6, 48).double()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), dropfx.testing.record() as masks:
        compiled(x).sum().backward()
    assert [set(frame) for frame in masks] == [{site}]


def test_second_derivative_is_a_named_error() -> None:
    compiled = captured(mlp(48, 96, 8, activation=nn.Tanh))
    x = torch.randn(6, 48, requires_grad=True)
    loss = compiled(x).square().sum()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, x, create_graph=True)[0].square().sum().backward()


def test_a_failing_pass_is_a_warning_and_the_graph_runs_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: Any, context: Any) -> Any:
        raise KeyError("broken")

    monkeypatch.setattr("dropfx.frontend.rewrite_captured.PIPELINE", (broken,))
    compiled, x = captured(mlp(48, 96, 8), inner="eager"), torch.randn(6, 48)
    with pytest.warns(RuntimeWarning, match="pass 'broken' failed.*runs as written"):
        out = compiled(x)
    assert out.shape == (6, 8)
    with dropfx.disabled(), pytest.warns(RuntimeWarning, match="runs as written"):
        torch.testing.assert_close(compiled(x), compiled(x))
