"""The forwards of nn.LSTM, nn.GRU and nn.RNN, recorded as the functions that they call: torch.lstm and its kin.

These take all weights as one list and keep the dropouts between layers to themselves; the pass `expand_recurrent`
takes them apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from dropfx.tracing.proxies import LiveFloat, Proxy, TensorProxy
from dropfx.tracing.refusal import TraceRefused

if TYPE_CHECKING:
    from dropfx.tracing.tracer import Tracer

RECURRENT_MODULES = (nn.LSTM, nn.GRU, nn.RNN)
"""Modules whose forward is recorded so, those of subclasses that call it included."""

_ZEROS = torch.zeros  # while a trace is made another function has this name

_OWN_METHODS = (
    *("__getattr__", "__getattribute__", "__setattr__", "check_input", "check_hidden_size", "check_forward_args"),
    *("get_expected_hidden_size", "get_expected_cell_size", "permute_hidden"),
    *("_update_flat_weights", "_weights_have_changed", "_init_flat_weights"),
)
"""What the forward relies on; another in its place in a subclass would not be recorded."""


def why_a_call(module: Any, original: Any) -> str | None:
    """Why the module stays a call; "" where that needs no word, None where its forward is recorded."""
    if module._dropfx_class in RECURRENT_MODULES:
        return None if why_not(module, original) is None else ""
    return _unlike(module, original)


def why_not(module: Any, original: Any) -> str | None:
    """Why a forward of PyTorch's does not mean what its class says; None where it does, with its dropouts on."""
    if not module.training:
        return "it does not train"
    named = "it has weights other than those of their names"
    return _unlike(module, original) or (named if _weights(module, original) is None else None)


def _unlike(module: Any, original: Any) -> str | None:
    """What makes PyTorch's forward do otherwise in a subclass."""
    cls = module._dropfx_class
    base = next(base for base in RECURRENT_MODULES if isinstance(module, base))
    if cls is not base and parametrize.is_parametrized(original):
        return "its weights are parametrized"
    replaced = [name for name in _OWN_METHODS if getattr(cls, name, None) is not getattr(base, name, None)]
    return f"it is a subclass of {base.__name__} with a {replaced[0]} of its own" if replaced else None


def takes_weight(module: Any, name: str) -> bool:
    """Whether a tensor can be put under a name as a weight: the module has none, no parameter and no property."""
    if not isinstance(module, RECURRENT_MODULES) or name not in module._flat_weights_names:
        return False
    return name not in module._parameters and not hasattr(type(module), name)


def _weights(module: Any, original: Any) -> list[Any] | None:
    """Those that the forward will use, None where one is neither the parameter of its name nor written by the trace.

    The forward uses `_flat_weights`, of which a write of a weight keeps its place up to date; it makes that list anew
    where a parameter is another than when it was made last, as under torch.func.functional_call.
    """
    names, listed = module._flat_weights_names, module._flat_weights
    named = [_weight(module, name) for name in names]
    if any(weight is None for weight in named):
        return None
    same = len(named) == len(listed) and all(
        weight is old or name in module.__dict__ for name, weight, old in zip(names, named, listed, strict=True)
    )
    anew = any(isinstance(module._parameters.get(name), Proxy) for name in names)
    return named if same or anew or original._weights_have_changed() else None


def _weight(module: Any, name: str) -> Any:
    """Of that name: a value of the trace that the forward has written, or the parameter."""
    written = module.__dict__.get(name)
    return written if isinstance(written, Proxy) else module._parameters.get(name)


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
    weights = [_weight(module, name) for name in module._flat_weights_names]
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
        return tracer.record("call_function", _ZEROS, (count, self._x.size(self._axis), size), _like(self._x))

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
        return tracer.record_known("call_function", _ZEROS, sizes, value, _like(data))

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
