"""Families `before_*` and `after_*`, continued: operations along another axis than the units'.

Each works unit by unit, so that both Linears around the site can skip what is dropped (`BOTH`), or the one before it
only where 0 does not stay 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.catalogue.case import case, vectors
from tests.catalogue.units import WIDTH, Between, Op

BOTH: dict[str, Op] = {
    "mean_rows": lambda h, m, x: h.mean(1),
    "mean_rows_kept": lambda h, m, x: h.mean(dim=1, keepdim=True) * x.sum(-1, keepdim=True),
    "sum_two_axes": lambda h, m, x: h.unsqueeze(1).sum((0, -2)),
    "max_rows": lambda h, m, x: h.amax(dim=1),
    "min_rows": lambda h, m, x: torch.amin(h, 1),
    "chunk_of_rows": lambda h, m, x: h.chunk(3, 1)[1],
    "chunks_of_rows": lambda h, m, x: h.chunk(3, 1)[0] * h.chunk(3, 1)[2].tanh(),
    "split_rows": lambda h, m, x: torch.cat([F.relu(part) for part in h.split([1, 2], dim=1)], 1),
    "split_batch": lambda h, m, x: h.split(1)[0],
    "unbind_rows": lambda h, m, x: torch.cat([row.tanh() for row in h.unbind(1)]),
    "unbind_batch": lambda h, m, x: h.unbind()[0],
    "narrow_rows": lambda h, m, x: h.narrow(1, 1, 2),
    "select_rows": lambda h, m, x: torch.select(h, 1, -1),
    "first_row": lambda h, m, x: h[:, 0],
    "index_select_rows": lambda h, m, x: h.index_select(1, torch.tensor([2, 0, 2])),
    "index_select_flat": lambda h, m, x: h.view(-1, WIDTH).index_select(-2, torch.tensor([1, 0, 2, 2])),
    "flip_two_axes": lambda h, m, x: h.flip(0, 1),
    "flip_listed": lambda h, m, x: torch.flip(h, dims=(0,)),
    "roll_sequence": lambda h, m, x: torch.roll(h, (1, 1), dims=(0, 1)),
    "cumsum_sequence": lambda h, m, x: h.cumsum(dim=1),
    "stack_rows": lambda h, m, x: torch.stack([row.tanh() for row in h.unbind(1)], 1),
    "stack_first": lambda h, m, x: torch.stack(h.unbind(1)),
    "stack_behind_units": lambda h, m, x: torch.stack([h, h.tanh()], -1).sum(-1),
    "stack_next_to_units": lambda h, m, x: torch.stack((h, h.tanh()), dim=-2),
    "cat_itself": lambda h, m, x: torch.cat((h, h.tanh()), dim=1),
    "layer_scale": lambda h, m, x: h.mul_(m.unit),
    "transposed_attribute": lambda h, m, x: h.mT.contiguous().mT,
}

# what was dropped is not zero afterwards
BEFORE_ONLY: dict[str, Op] = {
    "softmax_sequence": lambda h, m, x: h.softmax(1),
    "log_softmax_sequence": lambda h, m, x: F.log_softmax(h, dim=-2),
    "cat_dense": lambda h, m, x: torch.cat([h, m.side(x)], 1),
    "stack_dense": lambda h, m, x: torch.stack([h, m.side(x)], 1),
    "mean_of_sigmoid": lambda h, m, x: h.sigmoid().mean(1),
}

# along the units themselves: second entry: width of the result
NEITHER: dict[str, tuple[Op, int]] = {
    "chunk_units": (lambda h, m, x: h.chunk(2, -1)[0], 32),
    "split_units": (lambda h, m, x: h.split(32, dim=-1)[1].tanh(), 32),
    "unbind_units": (lambda h, m, x: torch.cat([h, h], -1).unflatten(-1, (2, 64)).unbind(-2)[1], WIDTH),
    "narrow_units": (lambda h, m, x: h.narrow(-1, 3, 32), 32),
    "select_unit": (lambda h, m, x: h * h.select(-1, 5).unsqueeze(-1), WIDTH),
    "slice_units": (lambda h, m, x: h[..., 8:40], 32),
    "flip_units": (lambda h, m, x: h.flip(1, -1), WIDTH),
    "roll_flat": (lambda h, m, x: h.roll(5), WIDTH),
    "cumsum_units": (lambda h, m, x: h.cumsum(dim=-1), WIDTH),
    "mean_of_units": (lambda h, m, x: h - h.mean((1, 2), keepdim=True), WIDTH),
    "cat_units": (lambda h, m, x: torch.cat([h, h], dim=2)[..., 32:96], WIDTH),
    "softmax_units": (lambda h, m, x: h + h.softmax(2), WIDTH),
}

for name, op in (BOTH | BEFORE_ONLY).items():
    case(f"before_{name}", vectors(32, 3), rewritten=("drop",))(lambda op=op: Between(before=op))
    case(f"after_{name}", vectors(32, 3), rewritten=("drop",))(lambda op=op: Between(after=op))
for name, (op, width) in NEITHER.items():
    case(f"before_{name}", vectors(32, 3), rewritten=("drop",))(lambda op=op, width=width: Between(op, width=width))
    case(f"after_{name}", vectors(32, 3), rewritten=("drop",))(
        lambda op=op, width=width: Between(after=op, width=width)
    )
