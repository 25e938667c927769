"""What Inductor makes of a rewritten graph: fused kernels on compact tensors, right strides, cached compilations."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from dropfx import ops
from dropfx.ops.embedding import embedding_backward_op
from dropfx.ops.linear import linear_backward_op
from dropfx.ops.runs import GatheredWeight
from tests.catalogue.case import mlp
from tests.frontend.steps import captured, check, eager, one_backward

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Pointwise(nn.Module):
    """A chain of pointwise operations on both sides of a site."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.inner, self.drop, self.outer = nn.Linear(48, 96), nn.Dropout(p), nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x) * 0.5).sin()
        return self.outer(torch.nn.functional.gelu(self.drop(h)) * 1.5)


@pytest.mark.parametrize("pattern", ["block", pytest.param("row", marks=pytest.mark.slow)])
def test_pointwise_operations_fuse_on_compact_tensors(pattern: str) -> None:
    original, x = Pointwise(), torch.randn(6, 48)
    compiled = captured(original, inner="inductor", pattern=pattern)
    with torch._inductor.config.patch(force_disable_caches=False, fx_graph_cache=False):
        result, code = run_and_get_code(lambda: one_backward(compiled, compiled, x))
    assert result.shape == (6, 8)
    forward, backward = code
    # each weight is gathered once; the products and the places of their gradients are Inductor's
    assert [re.findall(r"torch\.ops\.dropfx\.(\w+)\.default\(", part) for part in code] == [["gathered_weight"] * 2, []]
    assert forward.count(" extern_kernels.addmm(") == 2
    assert len(re.findall(r" extern_kernels\.(?:add)?mm\(", backward)) == 3
    # the whole chain between the products is one kernel in each direction, which places a gradient too where it can
    chains = [re.findall(r" (cpp_fused_\w*tanh\w*)\(", part) for part in code]
    assert [len(kernels) for kernels in chains] == [1, 1]
    assert all(name in chains[0][0] for name in ("sin", "gelu", "mul"))
    source = forward[forward.index(f"{chains[0][0]} = ") :].partition("'''")[2].partition("'''")[0]
    loops = [int(bound) for bound in re.findall(r"<static_cast<int64_t>\((\d+)L\)", source)]
    if pattern == "block":  # 48 of 96 units are kept
        assert loops == [6 * 48], source
    torch._dynamo.reset()
    check(original, compiled, one_backward, x, sites={"drop"}, dtype=torch.float32)


@pytest.mark.parametrize(("inner", "bias"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
def test_weights_are_gathered_once_a_step(inner: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the eager function does; a weight behind the first layer, whose input asks for no gradient, included."""
    gathered = []
    gather = GatheredWeight.gather
    monkeypatch.setattr(GatheredWeight, "gather", lambda self, weight: gathered.append(self) or gather(self, weight))
    original = mlp(48, 96, 64, 8, bias=bias)
    for compiled in (captured(original, inner=inner), eager(original)):
        one_backward(compiled, compiled, torch.randn(6, 48))
        gathered.clear()
        one_backward(compiled, compiled, torch.randn(6, 48))
        assert len(gathered) == 3


def starts(*values: int) -> Tensor:
    return torch.tensor(values)


def laid_out(*shape: int) -> list[Tensor]:
    """A tensor as PyTorch makes it, transposed in memory, every second element of a larger one, and expanded."""
    plain = torch.randn(shape)
    return [
        plain,
        torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))),
        torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
        torch.randn(1, *shape[1:]).expand(shape),
    ]


WIDTH, KEPT = 32, starts(4, 12, 20, 24)  # four blocks of four
CASES: dict[str, Any] = {
    "linear rows": lambda x, w: (ops.linear_op, (x, w, None, KEPT, 4, None, 0, 1.0)),
    "linear one row block": lambda x, w: (ops.linear_op, (x, w, None, starts(4), 16, None, 0, 1.0)),
    "linear cols": lambda x, w: (ops.linear_op, (x[..., :16], w, None, None, 0, KEPT, 4, 2.0)),
    "linear both": lambda x, w: (ops.linear_op, (x[..., :16], w, None, KEPT, 4, KEPT, 4, 2.0)),
    "linear groups": lambda x, w: (ops.linear_op, (x, w, None, KEPT.view(2, 2), 4, None, 0, 2.0, 3, 0)),
    "kept weight": lambda x, w: (ops.gathered_weight_op, (w, KEPT, 4, KEPT, 4)),
    "kept units of a weight": lambda x, w: (ops.gathered_weight_op, (w, None, 0, KEPT, 1)),
    "kept window of a weight": lambda x, w: (ops.gathered_weight_op, (w, starts(4), 16, None, 0)),
    "kept wrapped window": lambda x, w: (ops.gathered_weight_op, (w, starts(24), 16, starts(20), 16)),
    "linear backward": lambda x, w: (
        linear_backward_op,
        (x[..., :16], x, w, KEPT, 4, None, 0, 1.0, [True, True, True]),
    ),
    "gather": lambda x, w: (ops.gather_op, (x, KEPT, 4, -1)),
    "take a window": lambda x, w: (ops.gather_op, (x, starts(4), 16, -1)),
    "take channels": lambda x, w: (ops.gather_op, (x, starts(1, 3), 1, -2)),
    "scatter": lambda x, w: (ops.scatter_op, (x[..., :16], KEPT, 4, -1, WIDTH)),
    "put channels": lambda x, w: (ops.scatter_op, (x[..., :2, :], starts(1, 3), 1, -2, 5)),
    "residual": lambda x, w: (ops.residual_add_op, (x, x[..., :16], KEPT, 4, -1, WIDTH, 1.0)),
    "residual of another layout": lambda x, w: (
        ops.residual_add_op,
        (torch.randn(3, 5, WIDTH), x[..., :16], KEPT, 4, -1, WIDTH, 1.0),
    ),
    "residual broadcast": lambda x, w: (ops.residual_add_op, (x[:1], x[..., :16], KEPT, 4, -1, WIDTH, 1.0)),
    "embedding": lambda x, w: (ops.embedding_op, (torch.tensor([[0, 2], [1, 1]]), w, KEPT, 4, -1)),
    "embedding backward": lambda x, w: (
        embedding_backward_op,
        (x[:2, :2, :16], torch.tensor([[0, 2], [1, 1]]), KEPT, 4, -1, WIDTH, WIDTH),
    ),
    "tiles": lambda x, w: (ops.tiled_linear_op, (x, w, None, 8, 8, starts(2, 1), 2.0)),
}


@pytest.mark.parametrize("layout", range(4), ids=["plain", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("name", CASES)
def test_fake_strides_are_the_real_ones(name: str, layout: int) -> None:
    x, w = laid_out(3, 5, WIDTH)[layout], laid_out(WIDTH, WIDTH)[layout]
    op, args = CASES[name](x, w)
    real = op(*args)
    mode = FakeTensorMode()
    with mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    for got, want in zip(*([v] if isinstance(v, Tensor) else v for v in (fake, real)), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
        assert got.storage_offset() == want.storage_offset()


CACHE = """
import json, sys, torch
from torch import nn
from torch._dynamo.utils import counters
torch.set_num_threads(1)
torch.manual_seed(0)
options = json.loads(sys.argv[1])
model = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Dropout(0.5), nn.Linear(96, 8))
compiled = torch.compile(model, backend="dropfx", options={"min_speedup": 0, **options})
x = torch.randn(4, 48)
torch.manual_seed(5)
y = compiled(x)
y.sum().backward()
grads = [p.grad.sum().item() for p in model.parameters()]
found = counters["inductor"]
print(json.dumps([found["fxgraph_cache_hit"], found["fxgraph_cache_miss"], found["fxgraph_cache_bypass"],
    counters["aot_autograd"]["autograd_cache_hit"], y.sum().item(), *grads]))
"""


def compile_in_a_new_process(cache: pathlib.Path, **options: Any) -> tuple[list[int], list[float]]:
    """(hits, misses, bypasses of the graph cache, hits of AOTAutograd's), and numbers of a step."""
    command = [sys.executable, "-c", CACHE, json.dumps(options)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    return counts[:4], counts[4:]


@pytest.mark.slow
def test_second_process_finds_the_compiled_graphs(tmp_path: pathlib.Path) -> None:
    """Forward and backward; another pattern, rate of kept blocks or count of groups compiles its own."""
    first, numbers = compile_in_a_new_process(tmp_path)
    assert first[:3] == [0, 2, 0]
    second, again = compile_in_a_new_process(tmp_path)
    assert second[0] == 2 or second[3] == 1, second
    assert second[1:3] == [0, 0]
    assert again == numbers
    for options in ({"pattern": "slice"}, {"block": 6}, {"groups": 2}, {"pattern": "row"}):
        changed, _ = compile_in_a_new_process(tmp_path, **options)
        assert changed[0] == 0, options
        assert changed[1] == 2, options
