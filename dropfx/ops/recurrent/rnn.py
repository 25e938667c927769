"""h' = activation(pre + h @ W_hh^T), with tanh or relu"""

from __future__ import annotations

import torch
from torch import Tensor

from dropfx.ops.recurrent.cells import Flows, Saved, Weights, tanh_slope
from dropfx.ops.recurrent.steps import Steps


def forward(kind: str, pre: Tensor, h: Tensor, weights: Weights, steps: Steps) -> tuple[Tensor, Saved]:
    """Hidden states [N, H] of all steps; h becomes the last state of each sequence."""
    out, saved = pre.new_empty(pre.size(0), h.size(1)), Saved.empty(kind, pre, h)
    product = weights.product(h.size(0), len(steps.sizes))
    activation = torch.tanh if kind == "rnn_tanh" else torch.relu
    for b, (z, y, before) in steps.visit(pre, out, saved.before):
        before.copy_(h[:b])
        y.copy_(activation(product(before, z)))
        h[:b] = y
    return out, saved


def backward(kind: str, grad: Tensor, dh: Tensor, saved: Saved, weights: Weights, steps: Steps) -> Flows:
    """From the gradients of all hidden states and of the last one; dh becomes that of the first one."""
    pre = torch.empty_like(saved.gates)
    if kind == "rnn_tanh":
        tanh_slope(torch.ones_like(pre), saved.gates, grad_input=pre)
    else:
        pre.copy_(saved.gates > 0)
    product, zeros = weights.product_back(dh.size(0), len(steps.sizes)), torch.zeros_like(dh)
    hidden = torch.empty_like(grad)
    for b, (dy, dz, total) in steps.visit(grad, pre, hidden, backward=True):
        torch.add(dh[:b], dy, out=total)
        dz.mul_(total)
        dh[:b] = product(dz, zeros[:b])
    return Flows(pre, pre, hidden)
