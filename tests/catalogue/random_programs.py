"""Random programs of a dozen operations on values [B, T, n]: dropouts, Linears and in-place writes among them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (32, 64, 96)

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "exp": lambda h: (0.1 * h).clamp(max=9.0).exp(),  # two in a row would overflow
    "plus": lambda h: h + 0.5,
    "minus": lambda h: 1.0 - h,
    "scale": lambda h: 0.5 * h,
    "negate": lambda h: -h,
    "square": lambda h: 0.1 * h * h,
    "clamp": lambda h: h.clamp(-0.5, 2.0),
    "clamp_above": lambda h: h.clamp(min=0.1),
    "softmax": lambda h: 8.0 * h.softmax(-1),
    "softmax_rows": lambda h: h.softmax(1),
    "center": lambda h: h - h.mean(-1, keepdim=True),
    "center_rows": lambda h: h - h.mean(1, keepdim=True),
    "minus_max": lambda h: h - h.amax(-1, keepdim=True),
    "rows": lambda h: h.reshape(-1, h.shape[-1]).tanh().reshape(h.shape),
    "transposed": lambda h: h.transpose(0, 1).relu().transpose(0, 1),
    "heads": lambda h: h.unflatten(-1, (4, -1)).transpose(1, 2).tanh().transpose(1, 2).flatten(-2),
    "interleaved": lambda h: h.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2),
    "flip": lambda h: h.flip(-1),
    "flip_rows": lambda h: h.flip(1),
    "roll": lambda h: h.roll(3, -1),
    "cumsum_rows": lambda h: 0.5 * h.cumsum(1),
    "flip_batch": lambda h: h.flip(0, 1),
    "chunk_rows": lambda h: torch.cat([part.tanh() for part in h.chunk(2, 1)], 1),
    "unbind_rows": lambda h: torch.cat([row.unsqueeze(1) for row in h.unbind(1)], dim=1),
    "narrow_rows": lambda h: torch.cat([h.narrow(1, 1, 3), h.select(1, 0).unsqueeze(1)], 1),
    "select_rows": lambda h: h.index_select(1, torch.tensor([3, 1, 1, 0])),
    "halve_units": lambda h: torch.cat(h.chunk(2, -1)[::-1], -1),
    "scale_by_mean": lambda h: h * h.mean(1, keepdim=True),
    "sum_rows": lambda h: 0.25 * h.sum(dim=1, keepdim=True).expand(-1, 4, -1),
    "detach": lambda h: h.detach(),
    "mix_rows": lambda h: (h @ h.transpose(1, 2)).softmax(-1) @ h,
    "relu_": lambda h: h.relu_(),
    "scale_": lambda h: h.mul_(0.5),
    "plus_": lambda h: h.add_(0.25),
    "view_relu_": lambda h: h.view(-1, h.shape[-1]).relu_().view(h.shape),
    "assign_": lambda h: (h.__setitem__((slice(None), 0), 0.5), h)[1],
    "ignored_": lambda h: (h.mul_(1.5), h)[1],
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda h, g: h + g,
    "subtract": lambda h, g: h - g,
    "multiply": lambda h, g: 0.5 * h * g,
    "add_alpha": lambda h, g: torch.add(h, g, alpha=0.5),
    "gate": lambda h, g: F.silu(h) * g,
    "residual_": lambda h, g: h.add_(g),
    "maximum": torch.maximum,
    "halves": lambda h, g: torch.cat([h.chunk(2, -1)[0], g.chunk(2, -1)[1]], -1),
}


class Program(nn.Module):
    """Executes `steps`, each of which reads earlier values by index and appends one."""

    def __init__(self, seed: int, length: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, Any, tuple[int, ...]]] = []
        choose, widths = random.Random(seed), [64]
        for _ in range(length):
            self.add_step(choose, widths)
        self.add_linear(choose, widths, len(widths) - 1)
        self.outputs = sorted({len(widths) - 1, *choose.sample(range(len(widths)), 2)})

    def add_step(self, choose: random.Random, widths: list[int]) -> None:
        recent = max(0, len(widths) - choose.choice((1, 1, 2, 4)))
        kind = choose.random()
        if kind < 0.3:
            self.add_linear(choose, widths, recent)
        elif kind < 0.55:
            self.add_dropout(choose, recent)
            widths.append(widths[recent])
        elif kind < 0.62:
            self.add_layer(nn.LayerNorm(widths[recent]), recent)
            widths.append(widths[recent])
        else:
            others = [i for i, width in enumerate(widths) if width == widths[recent]]
            if kind < 0.75 and len(others) > 1:
                self.steps.append(("binary", choose.choice(list(BINARY)), (choose.choice(others), recent)))
            else:
                self.steps.append(("unary", choose.choice(list(UNARY)), (recent,)))
            widths.append(widths[recent])

    def add_linear(self, choose: random.Random, widths: list[int], source: int) -> None:
        shared = [i for i, layer in enumerate(self.layers) if getattr(layer, "in_features", 0) == widths[source]]
        if shared and choose.random() < 0.15:
            index = choose.choice(shared)
            self.steps.append(("layer", index, (source,)))
            widths.append(self.layers[index].out_features)
        else:
            widths.append(choose.choice(WIDTHS))
            self.add_layer(nn.Linear(widths[source], widths[-1], bias=choose.random() < 0.8), source)

    def add_dropout(self, choose: random.Random, source: int) -> None:
        p = choose.choice((0.25, 0.5, 0.75))
        if choose.random() < 0.3:
            self.steps.append(("functional", (p, choose.random() < 0.3), (source,)))
        else:
            self.add_layer(nn.Dropout(p, inplace=choose.random() < 0.15), source)

    def add_layer(self, layer: nn.Module, source: int) -> None:
        self.steps.append(("layer", len(self.layers), (source,)))
        self.layers.append(layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x * 1.0]
        for kind, what, sources in self.steps:
            read = [values[i] for i in sources]
            if kind == "layer":
                values.append(self.layers[what](read[0]))
            elif kind == "functional":
                values.append(F.dropout(read[0], what[0], self.training, inplace=what[1]))
            else:
                values.append((UNARY if kind == "unary" else BINARY)[what](*read))
        return tuple(values[i] for i in self.outputs)


def make_program(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Program(seed, length=8 + 4 * (seed % 4)).double()
