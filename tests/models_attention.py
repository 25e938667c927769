"""Attention and recurrent models: sites that must be left alone beside sites that must not."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tests.case import case, tokens, vectors


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


@case("transformer_layer", vectors(64, 5), optional=("dropout", "dropout1", "dropout2"))
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


@case("lstm", tokens(), optional=("drop1",), rewritten=("drop2",))
class RecurrentLM(nn.Module):
    def __init__(self, layer: type[nn.RNNBase] = nn.LSTM, dropout: float = 0.0) -> None:
        super().__init__()
        self.emb, self.drop1 = nn.Embedding(50, 64), nn.Dropout(0.5)
        self.rnn = layer(64, 64, num_layers=2, dropout=dropout, batch_first=True)
        self.drop2, self.decoder = nn.Dropout(0.5), nn.Linear(64, 50)

    def forward(self, ids: Tensor) -> tuple[Tensor, Any]:
        h, state = self.rnn(self.drop1(self.emb(ids)))
        return self.decoder(self.drop2(h)), state


case("gru", tokens(), optional=("drop1",), rewritten=("drop2",))(lambda: RecurrentLM(nn.GRU))
case("lstm_dropout", tokens(), optional=("drop1",), rewritten=("drop2",))(lambda: RecurrentLM(dropout=0.5))


class WeightDrop(nn.Module):
    """As in awd-lstm-lm: the recurrent weight is dropped and put in its place before each call."""

    def __init__(self, module: nn.Module, names: tuple[str, ...] = ("weight_hh_l0",), p: float = 0.5) -> None:
        super().__init__()
        self.module, self.names, self.p = module, names, p
        for name in names:
            weight = module._parameters.pop(name)
            module.register_parameter(f"{name}_raw", weight)
        module.flatten_parameters = self.leave_flat  # type: ignore[assignment]

    @staticmethod
    def leave_flat() -> None:
        """The dropped weight is no parameter, which cuDNN's flat buffer could hold."""

    def forward(self, *args: Any) -> Any:
        for name in self.names:
            raw = getattr(self.module, f"{name}_raw")
            setattr(self.module, name, F.dropout(raw, p=self.p, training=self.training))
        return self.module.forward(*args)


class WeightDropOutside(nn.Module):
    """As in fastai: the wrapper keeps the raw weight, the module a plain tensor."""

    def __init__(self, module: nn.Module, name: str = "weight_hh_l0", p: float = 0.5) -> None:
        super().__init__()
        self.module, self.name, self.p = module, name, p
        self.raw = nn.Parameter(getattr(module, name).data)
        delattr(module, name)

    def forward(self, *args: Any) -> Any:
        setattr(self.module, self.name, F.dropout(self.raw, p=self.p, training=self.training))
        return self.module(*args)


def weight_dropped(wrap: type[nn.Module]) -> nn.Module:
    model = RecurrentLM()
    model.rnn = wrap(model.rnn)
    return model


_AROUND = {"rewritten": ("drop1", "drop2"), "left": ("rnn:dropout_1",)}
case("weight_drop", tokens(), **_AROUND)(lambda: weight_dropped(WeightDrop))
case("weight_drop_outside", tokens(), **_AROUND)(lambda: weight_dropped(WeightDropOutside))
