"""A model with methods, properties and a mangled name, plain and compiled, for the tests of promise 6."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dropfx
from tests.catalogue import CASES
from tests.catalogue.case import recording


class Net(nn.Module):
    """A model with methods, properties, class attributes and a mangled name."""

    kind = "net"

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.lin1, self.drop, self.lin2 = nn.Linear(64, width), nn.Dropout(0.5), nn.Linear(width, 8)
        self.__secret = 2.0

    @property
    def width(self) -> int:
        return self.lin1.out_features

    @classmethod
    def make(cls, width: int) -> Net:
        return cls(width)

    @staticmethod
    def square(x: Tensor) -> Tensor:
        return x.square()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.drop(torch.tanh(self.lin1(x)))) * self.__secret

    def loss(self, x: Tensor) -> Tensor:
        return self.square(self(x)).sum()

    def extra_repr(self) -> str:
        return f"width={self.width}"


class SubNet(Net):
    """Calls its parent's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def nets(kind: type[Net] = Net) -> tuple[nn.Module, nn.Module]:
    original, compiled = kind().double(), kind().double()
    compiled.load_state_dict(original.state_dict())
    return original, dropfx.compile(compiled, min_speedup=0)


def example(batch: int = 4, seed: int = 0) -> Tensor:
    return CASES["mlp"].call(batch, torch.float64, seed)[0][0]


def recorded_sites(model: nn.Module, x: Tensor | None = None) -> set[str]:
    with recording() as masks:
        model(example() if x is None else x)
    return set(masks)
