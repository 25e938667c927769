"""Attention: sites that must be left alone beside sites that must not."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.catalogue.case import case, vectors


@case("attention_long", vectors(64, 32), left=("attn_drop",), rewritten=("resid_drop",))
@case("attention", vectors(64, 5), left=("attn_drop",), rewritten=("resid_drop",))
class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 192), nn.Linear(64, 64)
        self.attn_drop, self.resid_drop = nn.Dropout(0.25), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (z.view(B, T, 4, C // 4).transpose(1, 2) for z in self.qkv(x).split(C, dim=2))
        probabilities = self.attn_drop(F.softmax(q @ k.transpose(-2, -1) * (C // 4) ** -0.5, dim=-1))
        y = (probabilities @ v).transpose(1, 2).contiguous().view(B, T, C)
        return x + self.resid_drop(self.proj(y))


@case("scaled_dot_product", vectors(64, 5), rewritten=("resid_drop",))
class FusedAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (z.view(B, T, 4, C // 4).transpose(1, 2) for z in self.qkv(x).split(C, dim=2))
        p = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return x + self.resid_drop(self.proj(y.transpose(1, 2).reshape(B, T, C)))


@case("transformer_layer", vectors(64, 5), rewritten=("dropout", "dropout1", "dropout2"))
def transformer_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(64, 4, 128, dropout=0.25, batch_first=True, activation="gelu")


@case("multihead", vectors(64, 5), rewritten=("drop",))
class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, dropout=0.25, batch_first=True)
        self.drop, self.lin = nn.Dropout(0.5), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.drop(self.attention(x, x, x, need_weights=False)[0]))
