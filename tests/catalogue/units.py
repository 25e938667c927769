"""Families `before_*` and `after_*`: one operation between two Linears, before or after the dropout.

After a site only operations with f(0) = 0 that work unit by unit may run compact; before it any that work unit by unit.
Either way one of the two Linears can skip the dropped units, so that every site is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.catalogue.case import case, vectors

WIDTH = 64
Op = Callable[[Tensor, "Between", Tensor], Tensor]


class Between(nn.Module):
    """lin2(after(drop(before(lin1(x)))))."""

    def __init__(self, before: Op | None = None, after: Op | None = None, width: int = WIDTH) -> None:
        super().__init__()
        inner = width if before is not None else WIDTH
        self.lin1, self.drop, self.lin2 = nn.Linear(32, WIDTH), nn.Dropout(0.5), nn.Linear(width, 16)
        self.unit, self.scalar = nn.Parameter(torch.rand(inner) + 0.5), nn.Parameter(torch.tensor(1.5))
        self.side, self.norm = nn.Linear(32, WIDTH), nn.LayerNorm(WIDTH)
        self.register_buffer("flag", torch.arange(WIDTH) % 3 == 0)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin1(x)
        if self.before is not None:
            h = self.before(h, self, x)
        h = self.drop(h)
        if self.after is not None:
            h = self.after(h, self, x)
        return self.lin2(h)


# name -> (operation, width of its result); f(0) = 0, unit by unit
ZERO_PRESERVING: dict[str, Op] = {
    "relu": lambda h, m, x: F.relu(h),
    "tanh": lambda h, m, x: h.tanh(),
    "gelu": lambda h, m, x: F.gelu(h),
    "gelu_tanh": lambda h, m, x: F.gelu(h, approximate="tanh"),
    "silu": lambda h, m, x: F.silu(h),
    "leaky_relu": lambda h, m, x: F.leaky_relu(h, 0.1),
    "elu": lambda h, m, x: F.elu(h),
    "abs": lambda h, m, x: h.abs(),
    "neg": lambda h, m, x: -h,
    "power": lambda h, m, x: h**2,
    "square": lambda h, m, x: h * h,
    "scale": lambda h, m, x: 0.125 * h,
    "divide": lambda h, m, x: h / 8,
    "scale_parameter": lambda h, m, x: h * m.scalar,
    "scale_unit": lambda h, m, x: h * m.unit,
    "divide_unit": lambda h, m, x: h / m.unit,
    "scale_row": lambda h, m, x: h * x.mean(-1, keepdim=True),
    "scale_dense": lambda h, m, x: h * m.side(x),
    "cast": lambda h, m, x: h.double().tanh().to(x.dtype),
    "type_as": lambda h, m, x: h.type_as(x),
    "clone": lambda h, m, x: h.clone().contiguous(),
    "reshape_rows": lambda h, m, x: h.reshape(-1, WIDTH).tanh().view(h.shape),
    "flatten_rows": lambda h, m, x: h.flatten(0, 1).unflatten(0, h.shape[:2]),
    "transpose_rows": lambda h, m, x: h.transpose(0, 1).contiguous().transpose(0, 1),
    "permute_rows": lambda h, m, x: h.permute(1, 0, 2).relu().permute(1, 0, 2),
    "unsqueeze": lambda h, m, x: h.unsqueeze(1).relu().squeeze(1),
    "clamp_zero": lambda h, m, x: h.clamp(min=0),
    "hardtanh": lambda h, m, x: F.hardtanh(h),
    "sum_with_itself": lambda h, m, x: h + h.tanh(),
}

# pointwise, but what was dropped is not zero afterwards
NOT_ZERO_PRESERVING: dict[str, Op] = {
    "sigmoid": lambda h, m, x: h.sigmoid(),
    "exp": lambda h, m, x: (0.1 * h).exp(),
    "cos": lambda h, m, x: h.cos(),
    "softplus": lambda h, m, x: F.softplus(h),
    "hardsigmoid": lambda h, m, x: F.hardsigmoid(h),
    "logsigmoid": lambda h, m, x: F.logsigmoid(h),
    "plus_one": lambda h, m, x: h + 1,
    "one_minus": lambda h, m, x: 1 - h,
    "plus_unit": lambda h, m, x: h + m.unit,
    "plus_parameter": lambda h, m, x: h + m.scalar,
    "plus_dense": lambda h, m, x: h + m.side(x),
    "minus_dense": lambda h, m, x: m.side(x) - h,
    "power_zero": lambda h, m, x: h**0,
    "clamp_above_zero": lambda h, m, x: h.clamp(min=0.1),
    "clamp_below_zero": lambda h, m, x: torch.clamp(h, max=-0.1),
    "hardtanh_above_zero": lambda h, m, x: F.hardtanh(h, 0.1, 2.0),
    "threshold": lambda h, m, x: F.threshold(h, 0.5, 3.0),
    "maximum": lambda h, m, x: torch.maximum(h, m.side(x)),
    "masked_fill": lambda h, m, x: h.masked_fill(m.flag, -1.0),
    "where": lambda h, m, x: torch.where(h > 0, h, torch.ones_like(h)),
    "equals_zero": lambda h, m, x: (h == 0).to(h.dtype) + h,
    "addcmul": lambda h, m, x: torch.addcmul(m.side(x), h, m.unit),
    "lerp": lambda h, m, x: torch.lerp(h, m.side(x), 0.3),
    "round": lambda h, m, x: torch.round(h) + 0.5,
}

# reads several units: dense, or whole blocks only; second entry: width of the result
ACROSS_UNITS: dict[str, tuple[Op, int]] = {
    "softmax": (lambda h, m, x: h.softmax(-1), WIDTH),
    "log_softmax": (lambda h, m, x: F.log_softmax(h, dim=-1), WIDTH),
    "softmax_rows": (lambda h, m, x: h.softmax(1), WIDTH),
    "layer_norm": (lambda h, m, x: m.norm(h), WIDTH),
    "rms": (lambda h, m, x: h * (h.pow(2).mean(-1, keepdim=True) + 0.1).rsqrt(), WIDTH),
    "normalize": (lambda h, m, x: F.normalize(h, dim=-1), WIDTH),
    "center": (lambda h, m, x: h - h.mean(-1, keepdim=True), WIDTH),
    "center_rows": (lambda h, m, x: h - h.mean(1, keepdim=True), WIDTH),
    "minus_max": (lambda h, m, x: h - h.amax(-1, keepdim=True), WIDTH),
    "times_sum": (lambda h, m, x: h * h.sum(-1, keepdim=True), WIDTH),
    "cumsum": (lambda h, m, x: h.cumsum(-1), WIDTH),
    "cumsum_rows": (lambda h, m, x: h.cumsum(1), WIDTH),
    "flip": (lambda h, m, x: h.flip(-1), WIDTH),
    "flip_rows": (lambda h, m, x: h.flip(1), WIDTH),
    "roll": (lambda h, m, x: h.roll(5, -1), WIDTH),
    "roll_rows": (lambda h, m, x: h.roll(1, 1), WIDTH),
    "sort": (lambda h, m, x: h.sort(-1).values, WIDTH),
    "glu": (lambda h, m, x: F.glu(h, dim=-1), 32),
    "chunks": (lambda h, m, x: h.chunk(2, -1)[0] * h.chunk(2, -1)[1], 32),
    "split": (lambda h, m, x: sum(h.split([16, 48], dim=-1)[1].chunk(3, -1)), 16),
    "slice": (lambda h, m, x: h[..., 3:35], 32),
    "slice_rows": (lambda h, m, x: h[:, :1], WIDTH),
    "ellipsis": (lambda h, m, x: h[:, None, ..., ::2].squeeze(1), 32),
    "index_select": (lambda h, m, x: h.index_select(-1, torch.arange(63, 0, -2)), 32),
    "cat": (lambda h, m, x: torch.cat([h, m.side(x)], -1), 128),
    "cat_rows": (lambda h, m, x: torch.cat([h, m.side(x)], 1), WIDTH),
    "stack": (lambda h, m, x: torch.stack([h, m.side(x)], -1).flatten(-2), 128),
    "repeat": (lambda h, m, x: h.repeat(1, 1, 2), 128),
    "expand_rows": (lambda h, m, x: h.unsqueeze(1).expand(-1, 2, -1, -1), WIDTH),
    "pad": (lambda h, m, x: F.pad(h, (1, 2)), 67),
    "split_heads": (lambda h, m, x: h.unflatten(-1, (4, 16)).transpose(1, 2).tanh().transpose(1, 2).flatten(-2), WIDTH),
    "interleave": (lambda h, m, x: h.unflatten(-1, (4, 16)).transpose(-1, -2).flatten(-2), WIDTH),
    "merge_rows": (lambda h, m, x: h.flatten(1), 192),
    "transposed": (lambda h, m, x: h.transpose(1, 2).softmax(-1).transpose(1, 2), WIDTH),
    "prelu": (lambda h, m, x: F.prelu(h.transpose(1, 2), m.unit).transpose(1, 2), WIDTH),
    "contract_units": (lambda h, m, x: h @ h.transpose(1, 2), 3),
    "contract_rows": (lambda h, m, x: h.transpose(1, 2) @ h, WIDTH),
    "einsum": (lambda h, m, x: torch.einsum("btc,bsc,bsd->btd", h, h, h), WIDTH),
    "gather": (lambda h, m, x: h.gather(-1, h.argsort(-1)), WIDTH),
    "topk": (lambda h, m, x: h.topk(5, -1).values, 5),
    "norm": (lambda h, m, x: h / (1 + h.norm(dim=-1, keepdim=True)), WIDTH),
}

# these may make the site one that a plan refuses as a whole
MAY_REFUSE = {"softmax", "log_softmax", "softmax_rows", "contract_units", "contract_rows"}
MAY_REFUSE |= {"einsum", "merge_rows", "interleave", "repeat", "expand_rows"}

for name, op in (ZERO_PRESERVING | NOT_ZERO_PRESERVING).items():
    case(f"before_{name}", vectors(32, 3), rewritten=("drop",))(lambda op=op: Between(before=op))
    case(f"after_{name}", vectors(32, 3), rewritten=("drop",))(lambda op=op: Between(after=op))
for name, (op, width) in ACROSS_UNITS.items():
    sites = {"optional" if name in MAY_REFUSE else "rewritten": ("drop",)}
    # the width of what is dropped; narrow axes have no drawn rate close enough to p
    if width >= 32:
        case(f"before_{name}", vectors(32, 3), **sites)(lambda op=op, width=width: Between(before=op, width=width))
    case(f"after_{name}", vectors(32, 3), **sites)(lambda op=op, width=width: Between(after=op, width=width))
