"""i, f, o = sigmoid(z)  g = tanh(z)  with z = pre + h @ W_hh^T        c' = f*c + i*g    h' = o*tanh(c') [@ W_hr^T]"""

from __future__ import annotations

import torch
from torch import Tensor

from dropfx.ops.recurrent.cells import Flows, Saved, Weights, sigmoid_slope, tanh_slope
from dropfx.ops.recurrent.steps import Steps


def forward(pre: Tensor, h: Tensor, c: Tensor, weights: Weights, steps: Steps) -> tuple[Tensor, Saved]:
    """Hidden states [N, P] of all steps; h and c become the last state of each sequence."""
    out, saved = pre.new_empty(pre.size(0), h.size(1)), Saved.empty("lstm", pre, h)
    product = weights.product(h.size(0), len(steps.sizes))
    for b, (z, gates, y, before, inner, squashed) in steps.visit(pre, saved.gates, out, *saved[1:]):
        before.copy_(h[:b])
        inner.copy_(c[:b])
        z = product(before, z)
        torch.sigmoid(z, out=gates)
        i, f, g, o = gates.chunk(4, 1)
        torch.tanh(z.chunk(4, 1)[2], out=g)
        torch.tanh(c[:b].mul_(f).addcmul_(i, g), out=squashed)
        if weights.hr is None:
            torch.mul(o, squashed, out=y)
        else:
            torch.mm(o * squashed, weights.hr.t(), out=y)
        h[:b] = y
    return out, saved


def backward(grad: Tensor, dh: Tensor, dc: Tensor, saved: Saved, weights: Weights, steps: Steps) -> Flows:
    """From the gradients of all hidden states and of the last state; dh and dc become those of the first one."""
    pre, of_cell = _slopes(saved)
    units = of_cell.size(1)
    product, zeros = weights.product_back(dh.size(0), len(steps.sizes)), torch.zeros_like(dh)
    hidden, f = torch.empty_like(grad), saved.gates.chunk(4, 1)[1]
    for b, (dy, dz, slope, forget, total) in steps.visit(grad, pre, of_cell, f, hidden, backward=True):
        torch.add(dh[:b], dy, out=total)
        dm = total if weights.hr is None else total @ weights.hr
        cell = dc[:b].addcmul_(dm, slope)
        blocks = dz.view(b, 4, units)
        blocks[:, :3].mul_(cell.unsqueeze(1))
        blocks[:, 3].mul_(dm)
        cell.mul_(forget)
        dh[:b] = product(dz, zeros[:b])
    return Flows(pre, pre, hidden)


def unprojected(saved: Saved) -> Tensor:
    """o*tanh(c'), what a projection multiplies [N, H]."""
    return saved.gates.chunk(4, 1)[3] * saved.squashed


def _slopes(saved: Saved) -> tuple[Tensor, Tensor]:
    """Of z [N, 4H], i, f, g by the cell state's gradient and o by h's; of the cell state by h's [N, H]."""
    made, of_cell = torch.empty_like(saved.gates), torch.empty_like(saved.squashed)
    i, f, g, o = saved.gates.chunk(4, 1)
    di, df, dg, do = made.chunk(4, 1)
    sigmoid_slope(g, i, grad_input=di)
    sigmoid_slope(saved.inner, f, grad_input=df)
    tanh_slope(i, g, grad_input=dg)
    sigmoid_slope(saved.squashed, o, grad_input=do)
    tanh_slope(o, saved.squashed, grad_input=of_cell)
    return made, of_cell
