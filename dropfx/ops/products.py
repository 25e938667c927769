"""Dense products with a scale, which BLAS multiplies in for free."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b"""
    # with beta=0 the first operand is not read
    return a @ b if scale == 1.0 else torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale * x @ weight^T + bias, any leading dimensions"""
    if scale == 1.0:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.size(-1))
    out = scaled_mm(flat, weight.t(), scale) if bias is None else torch.addmm(bias, flat, weight.t(), alpha=scale)
    return out.view(*x.shape[:-1], out.size(1))
