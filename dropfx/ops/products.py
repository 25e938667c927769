"""Dense products with a scale, which BLAS multiplies in for free."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b"""
    # with beta=0 the first operand is not read
    return a @ b if scale == 1.0 else torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


_ALIGNED = 8
"""Values of which a CPU's rows should be a multiple: float32 BLAS writes others at up to a third less speed."""


def misaligned(x: Tensor) -> bool:
    """Whether a product with the columns of x would have such rows."""
    return x.device.type == "cpu" and x.size(-1) % _ALIGNED != 0


def aligned_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b, as the first columns of rows that are long enough to begin where they should."""
    width = b.size(1)
    out = a.new_empty(a.size(0), width + -width % _ALIGNED)[:, :width]
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale * x @ weight^T + bias, any leading dimensions"""
    if scale == 1.0:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.size(-1))
    out = scaled_mm(flat, weight.t(), scale) if bias is None else torch.addmm(bias, flat, weight.t(), alpha=scale)
    return out.view(*x.shape[:-1], out.size(1))
