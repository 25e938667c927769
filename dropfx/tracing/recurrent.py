"""Calls of nn.LSTM, nn.GRU and nn.RNN, recorded as the functions that they call: torch.lstm and its kin.

These take all weights as one list and keep the dropouts between layers to themselves; the pass `expand_recurrent`
takes them apart.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dropfx.tracing.proxies import LiveFloat, Proxy, TensorProxy
from dropfx.tracing.refusal import TraceRefused

if TYPE_CHECKING:
    from dropfx.tracing.tracer import Tracer

RECURRENT_MODULES: dict[type[nn.Module], Any] = {nn.LSTM: torch.lstm, nn.GRU: torch.gru, nn.RNN: None}
"""Modules, by exact type, whose call is recorded so -> function; that of nn.RNN depends on its nonlinearity."""


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
    x, state = _arguments(*args, **kwargs)
    if not isinstance(x, TensorProxy):
        tracer.refuse(f"its input is a {type(x).__name__}")
    kind, lstm = module.mode.lower(), module.mode == "LSTM"
    dropout = module.dropout
    batched = x.value.dim() == 3
    axis = (0 if module.batch_first else 1) if batched else None
    if not batched:
        x = x.unsqueeze(0 if module.batch_first else 1)
        axis = 0 if module.batch_first else 1
    directions = 2 if module.bidirectional else 1
    hidden = module.proj_size or module.hidden_size
    sizes = [hidden, module.hidden_size] if lstm else [hidden]
    if state is None:
        like = {"dtype": x.value.dtype, "device": x.value.device}  # both in the key; new_zeros would read x
        places = module.num_layers * directions
        states = [tracer.record("call_function", torch.zeros, (places, x.size(axis), size), like) for size in sizes]
    else:
        states = list(state) if lstm else [state]
        states = states if batched else [part.unsqueeze(1) for part in states]
    _check(tracer, module, x, states)
    function = getattr(torch, kind)
    weights = [module._parameters[name] for name in module._flat_weights_names]
    made = tracer.record_recurrent(
        function,
        (
            x,
            tuple(states) if lstm else states[0],
            weights,
            module.bias,
            module.num_layers,
            float(dropout) if dropout else 0.0,  # without a site nothing else would see that it is switched on
            True,
            module.bidirectional,
            module.batch_first,
        ),
        _results(tracer, x, states, hidden * directions),
        (path, "dropout") if isinstance(dropout, LiveFloat) else None,
    )
    out, *last = made
    if not batched:
        out = out.squeeze(0 if module.batch_first else 1)
        last = [part.squeeze(1) for part in last]
    return out, (tuple(last) if lstm else last[0])


def _arguments(input: Any, hx: Any = None) -> tuple[Any, Any]:
    return input, hx


def _check(tracer: Tracer, module: Any, x: TensorProxy, states: list[TensorProxy]) -> None:
    """Raises what the module itself would raise for inputs of wrong sizes."""
    with tracer.paused():
        values = [part.value for part in states]
        if not x.value.size(1 if module.batch_first else 0):
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        module.check_forward_args(x.value, tuple(values) if module.mode == "LSTM" else values[0], None)
        for value in values:
            if value.dtype != x.value.dtype and not torch.is_autocast_enabled(x.value.device.type):
                raise TraceRefused("its input and its state differ in dtype")


def _results(tracer: Tracer, x: TensorProxy, states: list[TensorProxy], width: int) -> tuple[Tensor, ...]:
    """Fakes of the output and the last states."""
    with tracer.paused(), tracer.fake_mode:
        like = x.value
        values = [like.new_empty(*like.shape[:2], width), *(torch.empty_like(part.value) for part in states)]
        return tuple(value.requires_grad_(torch.is_grad_enabled()) for value in values)
