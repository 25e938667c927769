"""Calls of nn.LSTM, nn.GRU and nn.RNN, recorded as the functions that they call: torch.lstm and its kin.

These take all weights as one list and keep the dropouts between layers to themselves; the pass `expand_recurrent`
takes them apart.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dropfx.tracing.proxies import LiveFloat, Proxy, TensorProxy
from dropfx.tracing.refusal import TraceRefused

if TYPE_CHECKING:
    from dropfx.tracing.tracer import Tracer

RECURRENT_MODULES = (nn.LSTM, nn.GRU, nn.RNN)
"""Modules, by exact type, whose call is recorded so."""


def can_record(module: Any, original: Any) -> bool:
    """Whether a call means what the class says: all weights are parameters by their names, and dropouts are on."""
    return _weights(module, original) is not None and module.training


def _weights(module: Any, original: Any) -> list[Any] | None:
    """Those that the forward will use, None where one is not the parameter of its name.

    The forward uses `_flat_weights`, and makes that list anew where a parameter is another than when it was made last,
    as under torch.func.functional_call.
    """
    named = [module._parameters.get(name) for name in module._flat_weights_names]
    same = len(named) == len(module._flat_weights) and all(map(operator.is_, named, module._flat_weights))
    anew = any(isinstance(weight, Proxy) for weight in named) or original._weights_have_changed()
    return named if (same or anew) and all(weight is not None for weight in named) else None


def record(tracer: Tracer, module: Any, path: str, args: Any, kwargs: Any) -> Any:
    """What module.forward(*args, **kwargs) returns, in proxies."""
    given, state = _arguments(*args, **kwargs)
    lstm = module.mode == "LSTM"
    form: _Form = _Packed(given) if type(given) is PackedSequence else _Padded(tracer, given, module.batch_first)
    if state is None:
        count, hidden = module.num_layers * (1 + module.bidirectional), module.hidden_size
        sizes = [module.proj_size or hidden, hidden] if lstm else [hidden]
        states = [form.zeros(tracer, count, size) for size in sizes]
    else:
        states = [form.enter(part) for part in (state if lstm else [state])]
    _check(tracer, module, form, states)
    dropout = module.dropout
    rate = float(dropout) if dropout else 0.0  # without a site nothing else would see that it is switched on
    options = (module.bias, module.num_layers, rate, True, module.bidirectional)
    weights = [module._parameters[name] for name in module._flat_weights_names]
    made = tracer.record_recurrent(
        getattr(torch, module.mode.lower()),
        (*form.data, tuple(states) if lstm else states[0], weights, *options, *form.options),
        _results(tracer, form, states, 1 + module.bidirectional),
        (path, "dropout") if isinstance(dropout, LiveFloat) else None,
    )
    out, *last = made
    last = [form.leave(part) for part in last]
    return form.result(out), (tuple(last) if lstm else last[0])


def _arguments(input: Any, hx: Any = None) -> tuple[Any, Any]:
    return input, hx


class _Form(ABC):
    """How the input comes: what the function is given of it, and what its results and states are turned into.

    Attributes:
        data: its first arguments.
        options: its last arguments.
        batch_sizes: of packed input, else None.
    """

    data: tuple[Any, ...]
    options: tuple[Any, ...] = ()
    batch_sizes: Any = None

    @abstractmethod
    def zeros(self, tracer: Tracer, count: int, size: int) -> Any:
        """The first state, where none is given."""

    def enter(self, state: Any) -> Any:
        """A given state, as the function takes it."""
        return state

    def leave(self, state: Any) -> Any:
        """A last state, as the module returns it."""
        return state

    def result(self, out: Any) -> Any:
        """The output, as the module returns it."""
        return out


class _Padded(_Form):
    """[T, B, I], [B, T, I], or without a batch."""

    def __init__(self, tracer: Tracer, x: Any, batch_first: bool) -> None:
        if not isinstance(x, TensorProxy):
            tracer.refuse(f"its input is a {type(x).__name__}")
        self._batched, self._axis = x.value.dim() == 3, 0 if batch_first else 1
        self._x = x if self._batched else x.unsqueeze(self._axis)
        self.data, self.options = (self._x,), (batch_first,)

    def zeros(self, tracer: Tracer, count: int, size: int) -> Any:
        """Zeros [count, batch, size]."""
        return tracer.record("call_function", torch.zeros, (count, self._x.size(self._axis), size), _like(self._x))

    def enter(self, state: Any) -> Any:
        """The state with a batch axis."""
        return state if self._batched else state.unsqueeze(1)

    def leave(self, state: Any) -> Any:
        """The state without the batch axis that it was given."""
        return state if self._batched else state.squeeze(1)

    def result(self, out: Any) -> Any:
        """The output without the batch axis that it was given."""
        return out if self._batched else out.squeeze(self._axis)


def _like(x: TensorProxy) -> dict[str, Any]:
    """Options of torch.zeros; both are in the key, where new_zeros would read x."""
    return {"dtype": x.value.dtype, "device": x.value.device}


class _Packed(_Form):
    """A PackedSequence: rows [N, I] step after step, sequences in order of their lengths."""

    def __init__(self, packed: Any) -> None:
        self._packed = packed
        self.data, self.batch_sizes = (packed.data, packed.batch_sizes), packed.batch_sizes

    def zeros(self, tracer: Tracer, count: int, size: int) -> Any:
        """Zeros [count, sequences, size]: as many sequences as the first step has rows."""
        data, batch_sizes = self.data
        with tracer.paused(), tracer.fake_mode:
            value = data.value.new_zeros(count, data.value.size(0) // batch_sizes.value.size(0), size)
        sizes = count, batch_sizes[0], size
        return tracer.record_known("call_function", torch.zeros, sizes, value, _like(data))

    def enter(self, state: Any) -> Any:
        """The state with its sequences in order of their lengths."""
        order = self._packed.sorted_indices
        return state if order is None else state.index_select(1, order)

    def leave(self, state: Any) -> Any:
        """The state with its sequences in the order in which they came."""
        order = self._packed.unsorted_indices
        return state if order is None else state.index_select(1, order)

    def result(self, out: Any) -> Any:
        """The output's rows, packed as the input is."""
        return PackedSequence(out, *self._packed[1:])


def _check(tracer: Tracer, module: Any, form: _Form, states: list[Any]) -> None:
    """Raises what the module itself would raise for inputs of wrong sizes."""
    with tracer.paused():
        x, values = form.data[0].value, [part.value for part in states]
        if form.batch_sizes is None:
            if not x.size(1 if module.batch_first else 0):
                raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
            module.check_forward_args(x, tuple(values) if module.mode == "LSTM" else values[0], None)
        else:
            module.check_input(x, form.batch_sizes.value)
        for value in values:
            if value.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                raise TraceRefused("its input and its state differ in dtype")


def _results(tracer: Tracer, form: _Form, states: list[Any], directions: int) -> tuple[Tensor, ...]:
    """Fakes of the output and the last states."""
    with tracer.paused(), tracer.fake_mode:
        x, first = form.data[0].value, states[0].value
        values = [x.new_empty(*x.shape[:-1], first.size(-1) * directions)]
        values += [torch.empty_like(part.value) for part in states]
        return tuple(value.requires_grad_(torch.is_grad_enabled()) for value in values)
