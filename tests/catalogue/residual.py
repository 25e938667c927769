"""Residual models: x + dropout(linear(h)) in all its spellings, transformer blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.catalogue.case import case, vectors


class Residual(nn.Module):
    """x joined with dropout(linear(relu(linear(x))))."""

    def __init__(self, join: str = "add") -> None:
        super().__init__()
        self.lin1, self.lin2, self.drop, self.head = (
            nn.Linear(64, 96),
            nn.Linear(96, 64),
            nn.Dropout(0.5),
            nn.Linear(64, 8),
        )
        self.join = join

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.drop(self.lin2(F.relu(self.lin1(x))))
        match self.join:
            case "add":
                z = x + y
            case "reversed":
                z = y + x
            case "alpha":
                z = torch.add(x, y, alpha=0.5)
            case "alpha_reversed":
                z = torch.add(y, x, alpha=-2.0)
            case "method":
                z = x.add(y)
            case "sub":
                z = x - y
            case "scaled":
                z = x + 0.5 * y
            case "twice":
                z = x + y + y
        return self.head(z), x * 2.0


for join in ("add", "reversed", "alpha", "method", "scaled"):
    case(f"residual_{join}", vectors(64, 5), rewritten=("drop",))(lambda join=join: Residual(join))
for join in ("alpha_reversed", "sub", "twice"):
    case(f"residual_{join}", vectors(64, 5), optional=("drop",))(lambda join=join: Residual(join))


@case("residual_broadcast_stream", lambda b, draw: (draw(b, 1, 64), draw(b, 5, 64)), rewritten=("drop",))
@case("residual_broadcast_branch", lambda b, draw: (draw(b, 5, 64), draw(b, 1, 64)), rewritten=("drop",))
@case("residual_broadcast_vector", lambda b, draw: (draw(64), draw(b, 5, 64)), rewritten=("drop",))
@case("residual_broadcast_last", lambda b, draw: (draw(b, 5, 1), draw(b, 5, 64)), optional=("drop",))
class ResidualBroadcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.drop, self.head = nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 8)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.head(x + self.drop(self.lin(h)))


@case("pre_norm_blocks", vectors(64, 5), rewritten=("0.drop", "0.resid", "1.drop", "1.resid", "2.drop", "2.resid"))
def pre_norm_blocks() -> nn.Module:
    return nn.Sequential(*(FeedForward() for _ in range(3)))


class FeedForward(nn.Module):
    """x + dropout(linear(dropout(gelu(linear(norm(x)))))), the norm before or after."""

    def __init__(self, width: int = 64, post_norm: bool = False) -> None:
        super().__init__()
        self.norm, self.lin1, self.lin2 = nn.LayerNorm(width), nn.Linear(width, 128), nn.Linear(128, width)
        self.drop, self.resid, self.post_norm = nn.Dropout(0.5), nn.Dropout(0.3), post_norm

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.post_norm else self.norm(x)
        h = self.resid(self.lin2(self.drop(F.gelu(self.lin1(h)))))
        return self.norm(x + h) if self.post_norm else x + h


case("post_norm_block", vectors(64, 5), rewritten=("drop", "resid"))(lambda: FeedForward(post_norm=True))
