"""Recurrent models: dropout before, between the layers of, and behind nn.LSTM, nn.GRU and nn.RNN."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.catalogue.case import Draw, Inputs, case, tokens

LSTM = functools.partial(nn.LSTM, 64, 64, 2, dropout=0.5)
ALL = ("drop1", "rnn.dropout[0]", "drop2")


def steps(*states: int, length: int = 5) -> Inputs:
    """A sequence [length, batch, 64] and, where their first sizes are given, initial states [size, batch, 64]."""

    def made(batch: int, draw: Draw) -> tuple[Any, ...]:
        x = draw(length, batch, 64)
        given = tuple(draw(size, batch, 64) for size in states)
        return (x, given if len(given) > 1 else given[0]) if given else (x,)

    return made


@case("lstm", tokens(), rewritten=("drop1", "drop2"))
class RecurrentLM(nn.Module):
    """Embedding, Dropout, the layers, Dropout, a vocabulary decoder."""

    def __init__(self, layer: Callable[..., nn.Module] = nn.LSTM, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        self.emb, self.drop1 = nn.Embedding(50, 64), nn.Dropout(0.5)
        self.rnn = layer(64, 64, num_layers=2, dropout=dropout, batch_first=True)
        self.drop2, self.decoder = nn.Dropout(0.5), nn.Linear(64, 50)
        if tied:
            self.decoder.weight = self.emb.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Any]:
        h, state = self.rnn(self.drop1(self.emb(ids)))
        return self.decoder(self.drop2(h)), state


case("gru", tokens(), rewritten=("drop1", "drop2"))(lambda: RecurrentLM(nn.GRU))
case("lstm_dropout", tokens(), rewritten=ALL)(lambda: RecurrentLM(dropout=0.5))
case("lstm_tied", tokens(), rewritten=ALL)(lambda: RecurrentLM(dropout=0.5, tied=True))


class Around(nn.Module):
    """Dropout before and behind a recurrent module, whose states are given and returned where the caller gives them."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        width = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        self.drop1, self.rnn, self.drop2, self.head = nn.Dropout(0.25), rnn, nn.Dropout(0.5), nn.Linear(width, 16)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        h, last = self.rnn(self.drop1(x), state)
        y = self.head(self.drop2(h))
        return y if state is None else (y, last)


def around(name: str, rnn: Callable[[], nn.RNNBase], inputs: Inputs | None = None, **given: Any) -> None:
    case(name, inputs or steps(), **{"rewritten": ALL, **given})(lambda: Around(rnn()))


GRU, RNN = functools.partial(nn.GRU, 64, 64, 2, dropout=0.5), functools.partial(nn.RNN, 64, 64, 2, dropout=0.5)
around("lstm_states", LSTM, steps(2, 2))
around("lstm_bidirectional", lambda: LSTM(bidirectional=True), steps(4, 4))
around("lstm_no_bias", lambda: LSTM(bias=False))
around("lstm_projected", lambda: LSTM(proj_size=32, bidirectional=True))
around("gru_dropout", GRU, steps(2))
around("gru_bidirectional", lambda: GRU(bidirectional=True, bias=False))
around("rnn_tanh", RNN, steps(2))
around("rnn_relu", lambda: RNN(nonlinearity="relu", bidirectional=True))
around("lstm_three_layers", lambda: nn.LSTM(64, 64, 3, dropout=0.5), rewritten=(*ALL, "rnn.dropout[1]"))
around("lstm_unbatched", LSTM, lambda batch, draw: (draw(5, 64),))


@case("lstm_last_state", steps(), rewritten=("rnn.dropout[0]", "drop"))
class LastState(nn.Module):
    """The output is not read; the state of the last step is, as classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.drop, self.head = LSTM(), nn.Dropout(0.5), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.rnn(x)
        return self.head(self.drop(h[-1]))


@case("lstm_separate", steps(), rewritten=("drop", "drop#2"))
class Separate(nn.Module):
    """Layers as modules of their own, with one dropout module between and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(64, 96), nn.LSTM(96, 48)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, _ = self.first(x)
        h, (_, c) = self.second(self.drop(h))
        return self.head(self.drop(h)), c


@case("lstm_twice", steps(), rewritten=("rnn.dropout[0]", "rnn.dropout[0]#2"))
class Twice(nn.Module):
    """One module called twice, the second time from the state that the first one left."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = LSTM()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, state = self.rnn(x)
        return h, self.rnn(h.flip(0), state)[0]


@case("lstm_cannot_be_traced", steps(), rewritten=("rnn.dropout[0]",))
class Branches(nn.Module):
    """Branches on data: the recurrent module is compiled on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = LSTM(), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x if float(x.detach().sum()) > 0 else -x)[0])


case("lstm_alone", steps(), rewritten=("dropout[0]",))(LSTM)


@case("lstm_with_hooks", steps(), rewritten=ALL[1:], optional=ALL[:1])
def with_hooks() -> nn.Module:
    model = Around(LSTM())
    model.rnn.register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
    return model


@case("lstm_parametrized", steps(), rewritten=ALL)
def parametrized() -> nn.Module:
    model = Around(LSTM())
    parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    return model


class Noisy(nn.LSTM):
    """A class of the user's own, whatever its forward does."""

    def forward(self, *args: Any) -> Any:
        out, state = super().forward(*args)
        return torch.tanh(out), state


around("lstm_subclass", lambda: Noisy(64, 64, 2, dropout=0.5))


class ThereAndBack(nn.GRU):
    """The forward of its class twice, the second time from the end."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        out, state = super().forward(x, state)
        back, state = super().forward(out.flip(0), hx=state)
        return back.flip(0), state


around("gru_subclass_twice", lambda: ThereAndBack(64, 64, 2, dropout=0.5), rewritten=(*ALL, "rnn.dropout[0]#2"))


class OwnHidden(nn.LSTM):
    """In which a method that nn.LSTM's forward calls is another."""

    def permute_hidden(self, hx: Any, permutation: Any) -> Any:
        return tuple(2 * part for part in super().permute_hidden(hx, permutation))


around(
    "lstm_own_method",
    lambda: OwnHidden(64, 64, 2, dropout=0.5),
    steps(2, 2),
    rewritten=ALL,
)


# -- WeightDrop -----------------------------------------------------------------------------------------------------


class WeightDrop(nn.Module):
    """As in awd-lstm-lm: the recurrent weight is dropped and put in its place before each call of the forward."""

    def __init__(
        self, module: nn.Module, names: tuple[str, ...] = ("weight_hh_l0",), p: float = 0.5, variational: bool = False
    ) -> None:
        super().__init__()
        self.module, self.names, self.p, self.variational = module, names, p, variational
        for name in names:
            weight = module._parameters.pop(name)
            module.register_parameter(f"{name}_raw", weight)
        module.flatten_parameters = self.leave_flat  # type: ignore[assignment]

    def leave_flat(self, *args: Any) -> None:
        """The dropped weight is no parameter, which cuDNN's flat buffer could hold."""
        return

    def scatter_weights(self) -> None:
        for name in self.names:
            raw = getattr(self.module, f"{name}_raw")
            if self.variational:
                mask = torch.ones(raw.size(0), 1, dtype=raw.dtype)
                mask = F.dropout(mask, p=self.p, training=True)
                weight = mask.expand_as(raw) * raw
            else:
                weight = F.dropout(raw, p=self.p, training=self.training)
            setattr(self.module, name, weight)

    def forward(self, *args: Any) -> Any:
        self.scatter_weights()
        return self.module.forward(*args)


class WeightDropOutside(nn.Module):
    """As in fastai: the wrapper keeps the raw weights, the module plain tensors, and is called."""

    def __init__(self, module: nn.Module, p: float = 0.5, names: Any = "weight_hh_l0") -> None:
        super().__init__()
        self.module, self.p, self.names = module, p, [names] if isinstance(names, str) else list(names)
        for name in self.names:
            weight = getattr(self.module, name)
            delattr(self.module, name)
            self.register_parameter(f"{name}_raw", nn.Parameter(weight.data))
            setattr(self.module, name, weight.detach().clone())
            self.module.flatten_parameters = self.leave_flat  # type: ignore[assignment]

    def scatter_weights(self) -> None:
        for name in self.names:
            raw = getattr(self, f"{name}_raw")
            setattr(self.module, name, F.dropout(raw, p=self.p) if self.training else raw.clone())

    def leave_flat(self) -> None:
        return

    def forward(self, *args: Any) -> Any:
        self.scatter_weights()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            return self.module(*args)


class DropsOwnWeight(nn.LSTM):
    """A subclass that puts its own dropped weight in its place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_hh_l0_raw = nn.Parameter(self.weight_hh_l0.data)
        del self._parameters["weight_hh_l0"]

    def forward(self, *args: Any) -> Any:
        raw = self.weight_hh_l0_raw
        self.weight_hh_l0 = F.dropout(raw, 0.5) if self.training else raw.clone()
        return super().forward(*args)


BOTH = ("weight_hh_l0", "weight_hh_l1")


def weight_dropped(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = RecurrentLM()
    model.rnn = wrap(model.rnn)
    return model


_AROUND = ("drop1", "rnn:dropout_1", "drop2")
case("weight_drop", tokens(), rewritten=_AROUND)(lambda: weight_dropped(WeightDrop))
case("weight_drop_outside", tokens(), rewritten=_AROUND)(lambda: weight_dropped(WeightDropOutside))


def wrapped(name: str, rnn: Callable[[], nn.Module], *sites: str, inputs: Inputs | None = None, **given: Any) -> None:
    """Around a wrapped recurrent module; a write of weights is refused where `left` names its site."""

    def build() -> nn.Module:
        model = Around(nn.LSTM(64, 64))
        model.rnn = rnn()  # type: ignore[assignment]
        return model

    case(name, inputs or steps(), **{"rewritten": ("drop1", *sites, "drop2"), **given})(build)


_TWO = ("rnn:dropout_1", "rnn:dropout_2")
wrapped("weight_drop_layers", lambda: WeightDrop(LSTM(), BOTH), *_TWO, "rnn.dropout[0]", inputs=steps(2, 2))
wrapped("weight_drop_outside_layers", lambda: WeightDropOutside(LSTM(), names=BOTH), *_TWO, "rnn.module.dropout[0]")
wrapped("weight_drop_gru", lambda: WeightDrop(nn.GRU(64, 64)), _TWO[0])
wrapped("weight_drop_rnn", lambda: WeightDropOutside(nn.RNN(64, 64)), _TWO[0])
wrapped("weight_drop_projected", lambda: WeightDrop(nn.LSTM(64, 80, proj_size=64)), _TWO[0])
wrapped("weight_drop_rows", lambda: WeightDrop(nn.LSTM(64, 64), variational=True), _TWO[0])
wrapped("weight_drop_rows_layers", lambda: WeightDrop(nn.GRU(64, 64, 2), BOTH, variational=True), *_TWO)
wrapped("weight_drop_own", lambda: DropsOwnWeight(64, 64), _TWO[0])


@case("weight_drop_bidirectional", steps(), rewritten=("rnn:dropout_1", "rnn:dropout_2"))
class BothWays(nn.Module):
    """A weight of each direction, and a module that is called twice with the same dropped weights."""

    def __init__(self) -> None:
        super().__init__()
        names = ("weight_hh_l0", "weight_hh_l0_reverse")
        self.rnn = CalledTwice(nn.LSTM(64, 32, bidirectional=True), names)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)


class CalledTwice(WeightDrop):
    def forward(self, x: Tensor) -> Tensor:
        self.scatter_weights()
        return self.module(self.module(x)[0])[0]


class ReadsBefore(WeightDropOutside):
    """Reads what its last call has left behind."""

    def forward(self, *args: Any) -> Any:
        last = self.module.weight_hh_l0
        self.scatter_weights()
        out, state = self.module(*args)
        return out * (1 + 0 * last.detach().sum()), state


class OfLinear(nn.Module):
    """A weight that is written into another module than a recurrent one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.raw = nn.Parameter(self.linear.weight.data)
        del self.linear.weight

    def forward(self, x: Tensor, state: Any = None) -> Any:
        self.linear.weight = F.dropout(self.raw, 0.5, self.training)
        return self.linear(x), state


def with_hooks_inside() -> nn.Module:
    made = WeightDropOutside(nn.LSTM(64, 64))
    made.module.register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
    return made


_LEFT = {"rewritten": ("drop2",), "left": ("rnn:dropout_1",), "optional": ("drop1",)}
wrapped("weight_drop_read_before", lambda: ReadsBefore(nn.LSTM(64, 64)), _TWO[0])
wrapped("weight_drop_of_linear", OfLinear, **_LEFT)
wrapped("weight_drop_hooks", with_hooks_inside, _TWO[0])
