"""A vision transformer with stochastic depth, as others write one: `dropfx bench rows` without other packages."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DropPath(nn.Module):
    """Drops whole samples [B, ...] at a rate (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x, or in training x * mask / (1 - rate) with one value a sample."""
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class Attention(nn.Module):
    """Self-attention of [B, N, C]."""

    def __init__(self, units: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(units, 3 * units), nn.Linear(units, units)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        samples, tokens, units = x.shape
        shape = samples, tokens, 3, self.heads, units // self.heads
        query, key, value = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(samples, tokens, units))
        return out


class Block(nn.Module):
    """Attention and two Linears, each a residual branch that may drop samples."""

    def __init__(self, units: int, heads: int, rate: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(units), Attention(units, heads)
        self.norm2 = nn.LayerNorm(units)
        self.mlp = nn.Sequential(nn.Linear(units, 4 * units), nn.GELU(), nn.Linear(4 * units, units))
        self.drop_path = DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        x = x + self.drop_path(self.attention(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class VisionTransformer(nn.Module):
    """Images [B, channels, size, size] -> [B, classes], by patches and a class token; one rate for all blocks."""

    def __init__(
        self, size: int, patch: int, channels: int, units: int, heads: int, depth: int, classes: int, rate: float
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, units, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, units))
        self.places = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, units) * 0.02)
        self.blocks = nn.Sequential(*(Block(units, heads, rate) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(units), nn.Linear(units, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits
