"""What the cells of all kinds share: names, memory for backward, gradients.

N rows of all steps, B sequences, H units, P = H or the size of the projection, G gates per unit.
    pre [N, G*H]  what the inputs add to the gates: x @ W_ih^T + b
    w_hh [G*H, P]  b_hh [G*H] (GRU)  w_hr [P, H] (LSTM with projection)
    h [B, P]  c [B, H] (LSTM)  the state, updated in place
A cell's `forward` walks the steps. Its `backward` first makes the slopes of all steps at once: then a step is one
product and a few small operations. The gradient of each weight is one product over all rows, made by the caller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dropfx.ops.kept import Kept
from dropfx.ops.recurrent.product import Product, product_with

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Kind of cell, as in `nn.RNNBase.mode` -> G."""


class Weights(NamedTuple):
    """Of the recurrence alone: those of the inputs are in `pre`.

    Attributes:
        hh: compact [G*H', P'] where the model drops this weight.
        rows, cols: which it keeps; None where all.
    """

    hh: Tensor
    bias_hh: Tensor | None = None
    hr: Tensor | None = None
    rows: Kept | None = None
    cols: Kept | None = None

    def cast(self, dtype: torch.dtype) -> Weights:
        """The same weights in another dtype."""
        bias, hr = (None if w is None else w.to(dtype) for w in (self.bias_hh, self.hr))
        return self._replace(hh=self.hh.to(dtype), bias_hh=bias, hr=hr)

    def product(self, batch: int, steps: int) -> Product:
        """(h, y) -> h @ W_hh^T + y"""
        return product_with(self.hh, batch, steps, self.rows, self.cols)

    def product_back(self, batch: int, steps: int) -> Product:
        """(dz, y) -> dz @ W_hh + y"""
        return product_with(self.hh.t(), batch, steps, self.cols, self.rows)


class Saved(NamedTuple):
    """What backward needs of all steps.

    Attributes:
        gates: [N, G*H] activated; of a plain RNN its output.
        before: [N, P] the hidden state before each step.
        inner: [N, H] LSTM: the cell state before each step; GRU: what the state adds to the new gate.
        squashed: [N, H] LSTM: tanh of the cell state.
    """

    gates: Tensor
    before: Tensor
    inner: Tensor
    squashed: Tensor

    @staticmethod
    def empty(kind: str, pre: Tensor, h: Tensor) -> Saved:
        """Memory for it; the parts that a kind of cell does not have are empty."""
        rows, units = pre.size(0), pre.size(1) // GATES[kind]
        plain, lstm = kind.startswith("rnn"), kind == "lstm"
        return Saved(
            pre.new_empty((0,) if plain else pre.shape),
            pre.new_empty(rows, h.size(1)),
            pre.new_empty((0,) if plain else (rows, units)),
            pre.new_empty((rows, units) if lstm else (0,)),
        )


class Flows(NamedTuple):
    """Gradients at all rows; those of the first state are made in place.

    Attributes:
        pre: [N, G*H]
        added: [N, G*H] of what the state adds to the gates; but for a GRU it is that of `pre`.
        hidden: [N, P] of the hidden states, whole.
    """

    pre: Tensor
    added: Tensor
    hidden: Tensor


sigmoid_slope = torch.ops.aten.sigmoid_backward.grad_input
tanh_slope = torch.ops.aten.tanh_backward.grad_input
"""(factor, activated, grad_input=out): the activation's derivative times a factor"""
