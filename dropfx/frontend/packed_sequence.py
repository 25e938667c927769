"""PackedSequence: as a structure of tensors, where it is one leaf to PyTorch's pytree, and as an input of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from dropfx.graph.dropout_ops import RECURRENT_MODULES


class _Open:
    """A packed sequence whose parts are leaves; unflattening makes a PackedSequence of them."""

    def __init__(self, packed: PackedSequence) -> None:
        self.parts = list(packed)


pytree.register_pytree_node(_Open, lambda opened: (opened.parts, None), lambda parts, _: PackedSequence(*parts))


def opened(tree: Any) -> Any:
    """The tree, in which the tensors of packed sequences are leaves."""
    if not any(type(leaf) is PackedSequence for leaf in pytree.tree_leaves(tree)):
        return tree
    return pytree.tree_map_only(PackedSequence, _Open, tree)


def takes_packed(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a recurrent layer is given a packed sequence."""
    return isinstance(module, RECURRENT_MODULES) and bool(args) and isinstance(args[0], PackedSequence)


def run_packed(module: Any, run: Callable[..., Any], packed: PackedSequence, hx: Any = None) -> tuple[Any, Any]:
    """The forward of a recurrent layer for a packed sequence, of which `run` does what is left of tensors.

    Args:
        run: (data, batch sizes, states) -> as `packed_layers`. PyTorch's own forward asks for numbers on the way, which
            end a graph.
    """
    data, batch_sizes, in_order, back = packed
    states = _states(module, data, int(batch_sizes[0]), hx, in_order)
    out, *last = run(data, batch_sizes, states)
    found = tuple(last if back is None else [state.index_select(1, back) for state in last])
    return PackedSequence(out, batch_sizes, in_order, back), found if module.mode == "LSTM" else found[0]


def packed_layers(module: Any, data: Tensor, batch_sizes: Tensor, states: list[Tensor]) -> Any:
    """Output and last states of all layers: the one call that PyTorch's forward comes down to."""
    kind: Any = {"RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu, "LSTM": torch.lstm, "GRU": torch.gru}[
        module.mode
    ]
    options = (module.bias, module.num_layers, module.dropout, module.training, module.bidirectional)
    return kind(data, batch_sizes, states if module.mode == "LSTM" else states[0], module._flat_weights, *options)


def _states(module: Any, data: Tensor, batch: int, hx: Any, in_order: Tensor | None) -> list[Tensor]:
    """The first states in the order of the packed sequences, zeros where none are given."""
    lead = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or module.hidden_size, *([module.hidden_size] if module.mode == "LSTM" else [])]
    if hx is None:
        return [data.new_zeros(lead, batch, width) for width in widths]
    given = list(hx) if module.mode == "LSTM" else [hx]
    module.check_forward_args(data, tuple(given) if module.mode == "LSTM" else given[0], torch.tensor([batch]))
    return given if in_order is None else [state.index_select(1, in_order) for state in given]
