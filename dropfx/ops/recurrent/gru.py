"""r, u = sigmoid(pre + s)  n = tanh(pre + r*s)  with s = h @ W_hh^T + b_hh        h' = n + u*(h - n)"""

from __future__ import annotations

import torch
from torch import Tensor

from dropfx.ops.recurrent.cells import Flows, Saved, Weights, sigmoid_slope, tanh_slope
from dropfx.ops.recurrent.steps import Steps


def forward(pre: Tensor, h: Tensor, c: Tensor, weights: Weights, steps: Steps) -> tuple[Tensor, Saved]:
    """Hidden states [N, H] of all steps; h becomes the last state of each sequence, c is not read."""
    out, saved = pre.new_empty(pre.size(0), h.size(1)), Saved.empty("gru", pre, h)
    product, units = weights.product(h.size(0), len(steps.sizes)), h.size(1)
    bias = h.new_zeros(3 * units) if weights.bias_hh is None else weights.bias_hh
    biases = bias.expand(h.size(0), -1).contiguous()
    for b, (z, gates, y, before, inner) in steps.visit(pre, saved.gates, out, saved.before, saved.inner):
        before.copy_(h[:b])
        added = product(before, biases[:b])
        inner.copy_(added[:, 2 * units :])
        both = torch.add(z[:, : 2 * units], added[:, : 2 * units], out=gates[:, : 2 * units])
        torch.sigmoid(both, out=both)
        r, u, n = gates.chunk(3, 1)
        torch.tanh(torch.addcmul(z[:, 2 * units :], r, inner, out=n), out=n)
        torch.lerp(n, before, u, out=y)
        h[:b] = y
    return out, saved


def backward(grad: Tensor, dh: Tensor, dc: Tensor, saved: Saved, weights: Weights, steps: Steps) -> Flows:
    """From the gradients of all hidden states and of the last one; dh becomes that of the first one."""
    units = grad.size(1)
    r, u, n = saved.gates.chunk(3, 1)
    pre = torch.empty_like(saved.gates)
    # slopes of u and n by h's gradient, that of r by n's
    sigmoid_slope(saved.inner, r, grad_input=pre[:, :units])
    sigmoid_slope(saved.before - n, u, grad_input=pre[:, units : 2 * units])
    tanh_slope(1 - u, n, grad_input=pre[:, 2 * units :])
    added, hidden = torch.empty_like(pre), torch.empty_like(grad)
    product = weights.product_back(dh.size(0), len(steps.sizes))
    for b, (dy, dz, ds, gates, total) in steps.visit(grad, pre, added, saved.gates, hidden, backward=True):
        torch.add(dh[:b], dy, out=total)
        dz.view(b, 3, units)[:, 1:].mul_(total.unsqueeze(1))
        dz[:, :units].mul_(dz[:, 2 * units :])
        ds.copy_(dz)
        ds[:, 2 * units :].mul_(gates[:, :units])
        dh[:b] = product(ds, total * gates[:, units : 2 * units])
    return Flows(pre, added, hidden)
