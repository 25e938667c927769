"""Dropouts and recurrent functions, which Dynamo captures as one call whatever their rate is.

Dynamo matches their arguments in C++, where a rate that changes becomes a constant, so that a schedule would need a
graph per value. A function that Dynamo does not look into takes the rate as it is: a number, and from its first change
on an input.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import allow_in_graph
from torch._dynamo.eval_frame import skip_code
from torch.autograd import Variable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dropfx.graph.dropout_ops import RECURRENT_FUNCTIONS


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    def whole(*args: Any, **kwargs: Any) -> Any:
        """The function, of which only the kind of its result is asked: that no rate changes."""
        fixed = {name: _fixed(value) for name, value in kwargs.items()}
        given = tuple(map(_fixed, args))
        if function not in RECURRENT_FUNCTIONS:
            return function(*given, **fixed)
        return _like_packed(*given) if isinstance(given[3], (list, tuple)) else _like_layers(function, *given)

    made: Callable[..., Any] = allow_in_graph(whole)
    return made


def _like_packed(data: Tensor, batch_sizes: Tensor, hx: Any, weights: Any, *options: Any) -> tuple[Tensor, ...]:
    """What a recurrent function returns for packed inputs, whose batch sizes it would ask for."""
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    gradients = sum(weight.flatten()[0] for weight in weights) * 0  # the results ask for one where the weights do
    width = states[0].size(2) * (2 if options[-1] else 1)
    return data.new_empty(data.size(0), width) + gradients, *(torch.empty_like(state) + gradients for state in states)


def _like_layers(function: Any, x: Tensor, hx: Any, weights: Any, *options: Any) -> tuple[Tensor, ...]:
    """What a recurrent function returns: it would walk the steps, and with that count them."""
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    if 0 in x.shape[:2]:  # which may be an error
        return function(x, hx, weights, *options)  # type: ignore[no-any-return]
    small = x.new_zeros(2, 2, x.size(2)).requires_grad_(x.requires_grad)
    firsts = [h.new_zeros(h.size(0), 2, h.size(2)).requires_grad_(h.requires_grad) for h in states]
    out, *last = function(small, firsts if isinstance(hx, (list, tuple)) else firsts[0], weights, *options)
    first, second = x.shape[:2]
    if out.is_contiguous():
        whole = out[:1, :1].expand(first, second, -1).clone()
    else:  # the batch is first in the model, and second in memory
        whole = out[:1, :1].expand(second, first, -1).clone().transpose(0, 1)
    batch = first if options[-1] else second
    return whole, *(state[:, :1].expand(-1, batch, -1).clone() for state in last)


def _fixed(value: Any) -> Any:
    return 0.5 if isinstance(value, torch.SymFloat) else value


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.scaled_dot_product_attention)
WHOLE = {function: _whole(function) for function in (*_DROPOUTS, *RECURRENT_FUNCTIONS)}
"""Function -> the one that stands for it in Dynamo's graph."""
FUNCTIONS = {whole: function for function, whole in WHOLE.items()}


def _copy(function: Any) -> Callable[..., Any]:
    """The same function as another object, which Dynamo has no rule for and follows.

    Called by a function mode it runs outside of that, so that it is given the functions of WHOLE by their names.
    """
    whole = {made.__name__: WHOLE[made] for made in _DROPOUTS}
    return FunctionType(function.__code__, {**function.__globals__, **whole}, function.__name__, function.__defaults__)


_attention = _copy(F.multi_head_attention_forward)  # Dynamo keeps it as one call, with the Linears inside


class _WholeCalls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_dynamo_compiling() and func in WHOLE:
            return WHOLE[func](*args, **(kwargs or {}))
        if func is Tensor.unflatten:  # its call of super() can be followed from a method alone (PyTorch 2.13)
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        if func is F.multi_head_attention_forward and torch.compiler.is_dynamo_compiling():
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


skip_code(_WholeCalls.__torch_function__.__code__)  # Dynamo follows it in what it captures, and nowhere else
whole_calls = _WholeCalls()
"""Within it Dynamo captures the functions of WHOLE by one call."""


allow_in_graph(Variable)  # AWD-LSTM's LockedDropout wraps its mask by the class of PyTorch before 0.4


def unfold(graph: fx.Graph) -> None:
    """Call the functions by their own names again."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in FUNCTIONS:
            node.target = FUNCTIONS[node.target]
        elif node.target is Variable and not node.kwargs.get("requires_grad") and len(node.args) == 1:
            node.op, node.target, node.kwargs = "call_method", "detach", {}
        elif node.op == "call_function" and _is_method(node.target):  # Tensor.split(x, 2), as the mode calls it
            node.op, node.target = "call_method", node.target.__name__


def _is_method(function: Any) -> bool:
    return getattr(Tensor, getattr(function, "__name__", ""), None) is function
