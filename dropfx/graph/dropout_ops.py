"""Which modules and functions drop, and what one call of these is named: shared by front end, passes and testing."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dropfx.ops.rows import dropout_of_rows
from dropfx.ops.shared_dropout import shared_dropout

DROPOUT_FUNCTIONS: dict[Any, int] = {
    F.dropout: -1,
    F.dropout1d: -2,
    F.dropout2d: -3,
    F.dropout3d: -4,
    torch.dropout: -1,
    shared_dropout: -1,
    dropout_of_rows: -1,
}
"""Dropouts that can be sites -> their unit axis, counted from the end."""
OF_ELEMENTS = (F.dropout, torch.dropout)
"""Those of which each element has a mask of its own."""


class OtherDropout(NamedTuple):
    """A function that drops and runs as written: why, and its arguments as (position, name, default)."""

    reason: str
    rate: tuple[int, str, float]
    training: tuple[int, str, bool] | None


_ALPHA = OtherDropout(
    "alpha dropout keeps mean and variance with values other than 0", (1, "p", 0.5), (2, "training", False)
)
_ATTENTION = "dropout on attention probabilities inside "

OTHER_DROPOUTS: dict[Any, OtherDropout] = {
    F.alpha_dropout: _ALPHA,
    F.feature_alpha_dropout: _ALPHA,
    F.scaled_dot_product_attention: OtherDropout(
        _ATTENTION + "scaled_dot_product_attention", (4, "dropout_p", 0.0), None
    ),
    F.multi_head_attention_forward: OtherDropout(
        _ATTENTION + "multi_head_attention_forward", (10, "dropout_p", 0.0), (13, "training", True)
    ),
}
"""Functions that drop and run as written; `dropfx.compile` looks into the last one, torch.compile and fx do not."""

BERNOULLI = ("bernoulli", "bernoulli_")
"""Operations that a mask may be drawn with; the sites that are made of them are named by their calls."""
UNIFORM = ("rand", "rand_like")
"""Operations from whose numbers a mask of rows may be made."""

RECURRENT_FUNCTIONS: dict[Any, str] = {
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
}
"""Functions of all layers of a recurrent network, with dropouts between these -> kind of the cell."""

_PADDED = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
_PACKED = ("data", "batch_sizes", *_PADDED[1:-1])


def recurrent_names(args: Sequence[Any]) -> tuple[str, ...]:
    """Names of the positional arguments of a RECURRENT_FUNCTION, whose packed inputs come with their batch sizes."""
    return _PACKED if len(args) > 3 and isinstance(args[3], (list, tuple)) else _PADDED


DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

RECURRENT_MODULES = (nn.LSTM, nn.GRU, nn.RNN)


class Call(NamedTuple):
    """One call of what drops: which one, the number of the call in a forward, and the part of it.

    Attributes:
        what: path of a module; of what a forward calls by itself, "path:dropout", "path:bernoulli" or
            "path:rand".
        part: "dropout[0]" and so on of a recurrent module.
    """

    what: str
    number: int = 1
    part: str = ""

    @property
    def name(self) -> str:
        """As in `record` and `explain` (docs/how_it_works.md, 3)."""
        if self.what.endswith((":dropout", ":bernoulli", ":rand")):
            return f"{self.what}_{self.number}"
        plain = ".".join(filter(None, (self.what, self.part)))
        return plain if self.number == 1 else f"{plain}#{self.number}"

    def behind(self, calls: Mapping[str, int]) -> Call:
        """The call, counted on from those that were made before its graph."""
        return self._replace(number=calls.get(self.what, 0) + self.number)


def may_drop(root: nn.Module) -> bool:
    """Whether any module below could drop, as far as types and the names in its code tell."""
    return any(_drops(module) for module in root.modules())


def makes_masks(root: nn.Module) -> bool:
    """Whether the code of any module below draws as masks made by hand are drawn."""
    classes = {module.__dict__.get("_dropfx_class", type(module)) for module in root.modules()}
    return any(name in (*BERNOULLI, *UNIFORM) for cls in classes if _is_users(cls) for name in _names_in(cls))


def _is_users(cls: type) -> bool:
    return not cls.__module__.startswith("torch.nn.")


def _drops(module: nn.Module) -> bool:
    if isinstance(module, (nn.modules.dropout._DropoutNd, nn.MultiheadAttention)):
        return True
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0
    cls = module.__dict__.get("_dropfx_class", type(module))
    if isinstance(module, torch.jit.ScriptModule) or not _is_users(cls):
        return False
    return any("dropout" in name.lower() or name in (*BERNOULLI, *UNIFORM) for name in _names_in(cls))


def _names_in(cls: type) -> Iterator[str]:
    """Names that the class' own code mentions, following plain Python functions of its globals."""
    seen: set[int] = set()
    pending = [
        function
        for base in cls.__mro__
        if base not in (nn.Module, object)
        for function in vars(base).values()
        if isinstance(function, types.FunctionType)
    ]
    while pending:
        function = pending.pop()
        if id(function) in seen or function.__module__.startswith("torch."):
            continue
        seen.add(id(function))
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
            yield from code.co_names
            for name in code.co_names:
                called = function.__globals__.get(name)
                if isinstance(called, types.FunctionType):
                    pending.append(called)
