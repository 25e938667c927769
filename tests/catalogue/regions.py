"""Models by the shape of their graph: chains, fan-out, embeddings, several readers, shared modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.catalogue.case import case, mlp, tokens, vectors


@case("mlp", rewritten=("2", "5"))
def small_mlp() -> nn.Module:
    return nn.Sequential(*mlp(64, 128, 96, p=0.5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(96, 10))


@case("mlp_three_dims", vectors(64, 5), rewritten=("2", "5"))
@case("mlp_four_dims", vectors(64, 2, 3), rewritten=("2", "5"))
@case("mlp_one_dim", lambda batch, draw: (draw(64),), rewritten=("2", "5"))
def narrow_mlp() -> nn.Module:
    return mlp(64, 128, 96, 10)


@case("mlp_no_bias", rewritten=("2", "5"))
def mlp_no_bias() -> nn.Module:
    return mlp(64, 128, 96, 10, bias=False)


@case("deep_chain", rewritten=("2", "5", "8", "11", "14"))
def deep_chain() -> nn.Module:
    return mlp(64, 64, 64, 64, 64, 64, 10, activation=nn.GELU)


@case("dropout_first", rewritten=("0",))
def dropout_first() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


@case("dropout_last", rewritten=("1",))
def dropout_last() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.Dropout(0.5))


@case("linear_dropout_linear", rewritten=("1",))
def linear_dropout_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.Dropout(0.3), nn.Linear(128, 64))


@case("two_dropouts_in_a_row", optional=("1", "2"))
def two_dropouts_in_a_row() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.Dropout(0.5), nn.Dropout(0.3), nn.Linear(128, 64))


@case("unused_dropout_result", optional=("drop",))
class UnusedResult(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.drop, self.lin2 = nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin1(x)
        self.drop(h)
        return self.lin2(h)


@case("functional", rewritten=(":dropout_1", "block:dropout_1", "block:dropout_2"))
class Functional(nn.Module):
    """`F.dropout` with `self.training` and `self.p`, in the root and in a child."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin1, self.lin2, self.p = nn.Linear(96, 128), nn.Linear(128, 96), 0.4

        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(torch.tanh(self.lin1(x)), self.p, self.training)
            return F.dropout(self.lin2(h), p=0.25, training=self.training)

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.block, self.head, self.p = nn.Linear(64, 96), Functional.Block(), nn.Linear(96, 10), 0.5

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.lin(x)), self.p, training=self.training)
        return self.head(self.block(h))


@case("qkv", vectors(64, 5), rewritten=("drop",))
class QKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        return F.softmax(q @ k.transpose(-1, -2) / 8.0, dim=-1) @ v


@case("qkv_fused", vectors(64, 5), rewritten=("drop",))
class FusedQKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.qkv = nn.Dropout(0.5), nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.drop(x)).chunk(3, dim=-1)
        return F.softmax(q @ k.transpose(-1, -2) / 8.0, dim=-1) @ v


@case("embedding", tokens(), rewritten=("drop",))
class Embedded(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 64, **options)
        self.drop, self.lin = nn.Dropout(0.5), nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin(self.drop(self.emb(ids) * 8.0))


case("embedding_padding", tokens(), rewritten=("drop",))(lambda: Embedded(padding_idx=0))
case("embedding_max_norm", tokens(), optional=("drop",))(lambda: Embedded(max_norm=1.0))
case("embedding_sparse", tokens(), optional=("drop",))(lambda: Embedded(sparse=True))
case("embedding_by_frequency", tokens(), optional=("drop",))(lambda: Embedded(scale_grad_by_freq=True))


@case("tied", tokens(), rewritten=("drop1", "drop2"))
class Tied(nn.Module):
    """The decoder's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.drop1, self.lin, self.drop2 = (
            nn.Embedding(50, 64),
            nn.Dropout(0.5),
            nn.Linear(64, 64),
            nn.Dropout(0.3),
        )
        self.decoder = nn.Linear(64, 50)
        self.decoder.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.drop2(torch.tanh(self.lin(self.drop1(self.emb(ids))))))


@case("two_draws_added", optional=("drop1", "drop2"))
class TwoDraws(nn.Module):
    """Two sites with different draws meet in one add."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.lin2, self.lin3 = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 16)
        self.drop1, self.drop2 = nn.Dropout(0.5), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin3(self.drop1(self.lin1(x)) + self.drop2(self.lin2(x)))


@case("aux_head", rewritten=("drop",))
class AuxHead(nn.Module):
    """A second head reads the value before the dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.drop, self.lin2, self.aux = (
            nn.Linear(64, 96),
            nn.Dropout(0.5),
            nn.Linear(96, 16),
            nn.Linear(96, 4),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.lin1(x))
        return self.lin2(self.drop(h)), self.aux(h)


@case("both_readers", rewritten=("drop",))
class BothReaders(AuxHead):
    """The dropped value is read by a Linear and returned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.drop(F.relu(self.lin1(x)))
        return self.lin2(h), self.aux(h), h


@case("product_read_by_norm_and_linear", vectors(64, 3), optional=("drop",))
class ProductReadTwice(nn.Module):
    """A product with the dropped value, for a dense reader and a Linear; the factors are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm, self.lin = nn.Dropout(0.5), nn.LayerNorm(64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        half = 0.5 * x
        h = self.drop(half)
        y = 0.5 * h * x
        return h, half, self.norm(y), self.lin(y)


@case("gated", vectors(64, 5), rewritten=("drop",))
class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3, self.drop = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 96), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.drop(F.silu(self.w1(x)) * self.w3(x)))


@case("gated_one_branch", vectors(64, 5), optional=("drop",))
class GatedOneBranch(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.drop(self.w1(x))) * self.w3(x))


@case("shared_dropout", rewritten=("drop", "drop#2", "drop#3"))
class SharedDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.lin2, self.lin3, self.lin4 = (
            nn.Linear(64, 96),
            nn.Linear(96, 64),
            nn.Linear(64, 96),
            nn.Linear(96, 8),
        )
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.lin1, self.lin2, self.lin3):
            x = self.drop(F.relu(layer(x)))
        return self.lin4(x)


@case("shared_linear", rewritten=("drop1", "drop2"))
class SharedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.drop1, self.drop2, self.head = (
            nn.Linear(64, 64),
            nn.Dropout(0.5),
            nn.Dropout(0.3),
            nn.Linear(64, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop1(torch.tanh(self.lin(x)))
        return self.head(self.drop2(torch.tanh(self.lin(h))))


@case("shared_block", rewritten=("block.2", "block.2#2"))
class SharedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


@case("same_input_twice", lambda batch, draw: (draw(batch, 64),) * 2, rewritten=("drop",))
class SameInputTwice(AuxHead):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.lin1(x))
        return self.lin2(self.drop(h)), y * 2.0 + x
