"""PackedSequence as a structure of tensors: to PyTorch's pytree it is one opaque leaf."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree


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


class Sizes(NamedTuple):
    """Fake results of packing, whose sizes depend on data: as if all sequences were as long as the longest."""

    first: Tensor
    second: Tensor


def pack(input: Tensor, lengths: Tensor, batch_first: bool) -> Sizes:
    """Data and batch sizes of torch._pack_padded_sequence."""
    steps, batch = input.shape[:2][::-1] if batch_first else input.shape[:2]
    sizes = torch.empty(steps, dtype=torch.int64, device="cpu")
    return Sizes(input.new_empty(steps * batch, *input.shape[2:]), sizes)


def pad(data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int) -> Sizes:
    """Padded data and lengths of torch._pad_packed_sequence."""
    batch = data.size(0) // batch_sizes.size(0)
    leading = (batch, total_length) if batch_first else (total_length, batch)
    return Sizes(data.new_empty(*leading, *data.shape[1:]), torch.empty(batch, dtype=torch.int64, device="cpu"))


FAKES = {torch._pack_padded_sequence: pack, torch._pad_packed_sequence: pad}
"""Function whose result no fake tensor tells -> one that stands for it while tracing."""
