"""Dense products with a scale, by the faster of the libraries at hand.

A plain product on a CPU is MKL's or OpenBLAS'. oneDNN lays out a weight in fewer steps and takes about two thirds of
the time for the forward product and the input gradient of float32: most where few rows meet a large weight, as those
of one group of a batch do ([32, 1024] @ [1024, 1024], four times: 3.1 ms by MKL, 2.0 by oneDNN, 1.9 as one of 128
rows). Of operands that are neither contiguous nor the transpose of what is it has a reference implementation only,
hundreds of times slower.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_WORK = 1 << 24
"""Multiplications from which on a product is oneDNN's: the call takes 30 us, and the first one of a shape .5 ms."""

_PLAIN = (Tensor, torch.nn.Parameter)


def _for_one_dnn(a: Tensor, b: Tensor) -> bool:
    """Whether a [m, k] @ b [k, n] is faster by oneDNN, and neither autograd, autocast nor a mode has to see it."""
    return (
        type(a) in _PLAIN  # a compiler's has sizes that are not to be asked
        and type(b) in _PLAIN
        and a.size(0) * b.numel() >= LEAST_WORK
        and a.dtype is b.dtype is torch.float32
        and a.device.type == "cpu"
        and a.is_contiguous()
        and (b.is_contiguous() or b.t().is_contiguous())
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _by_one_dnn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return out


def scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b"""
    if _for_one_dnn(a, b):
        # MKL multiplies the scale in for free, oneDNN does not: the smaller of operand and result pays
        if scale == 1.0 or b.size(1) < a.size(1):
            out = _by_one_dnn(a, b)
            return out if scale == 1.0 else out.mul_(scale)
        return _by_one_dnn(a * scale, b)
    # with beta=0 the first operand is not read
    return a @ b if scale == 1.0 else torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def scaled_bmm(a: Tensor, b: Tensor, scale: float, added: Tensor | None = None) -> Tensor:
    """scale * a [G, m, k] @ b [G, k, n] + added, which broadcasts"""
    if added is not None:
        return torch.baddbmm(added, a, b, alpha=scale)
    return a @ b if scale == 1.0 else torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


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
    flat = x.reshape(-1, x.size(-1))
    if _for_one_dnn(flat, weight.t()) and (bias is None or bias.dtype is torch.float32):
        out = _by_one_dnn(flat if scale == 1.0 else flat * scale, weight.t(), bias)
    elif scale == 1.0:
        return F.linear(x, weight, bias)
    elif bias is None:
        out = scaled_mm(flat, weight.t(), scale)
    else:
        out = torch.addmm(bias, flat, weight.t(), alpha=scale)
    return out.view(*x.shape[:-1], out.size(1))
