"""The product of a recurrence: small on one side, the same weight at every step.

A plain product of few rows spends more time on laying out the weight than on arithmetic, and does so at every step:
9 ms for [20, 1500] @ [1500, 6000] on two cores, where the arithmetic takes 2.6 at the rate of a large product. In
oneDNN's blocked layout it takes 4.4 as a Linear and 3.4 as a convolution; the layout costs about two steps, once.

Of a weight that keeps columns only, the same columns of x are read; of one that keeps rows, those of y are added to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dropfx.ops.kept import Kept
from dropfx.ops.runs import gather, scatter

Product = Callable[[Tensor, Tensor], Tensor]
"""(x [b, K], y [b, N]) -> x @ weight^T + y"""

_LEAST_BYTES = 1 << 20
"""Weights below this stay in a core's cache between two steps, where a plain product is as fast."""
_LEAST_STEPS = 8


def product_with(weight: Tensor, batch: int, steps: int, rows: Kept | None = None, cols: Kept | None = None) -> Product:
    """The product with a weight [N, K] of which `steps` will be made, of up to `batch` rows each.

    Args:
        weight: compact [N', K'] where rows or columns are kept.
    """
    product = _packed(weight, batch) if _pays(weight, steps) else _plain(weight)
    if cols is not None:
        product = _of_columns(product, cols)
    return product if rows is None else _onto_rows(product, rows, weight.new_zeros(batch, weight.size(0)))


def _plain(weight: Tensor) -> Product:
    transposed = weight.t()
    return lambda x, y: torch.addmm(y, x, transposed)


def _of_columns(product: Product, cols: Kept) -> Product:
    return lambda x, y: product(gather(x, 1, cols).contiguous(), y)


def _onto_rows(product: Product, rows: Kept, zeros: Tensor) -> Product:
    return lambda x, y: y + scatter(product(x, zeros[: x.size(0)]), 1, rows, y.size(1))


def _packed(weight: Tensor, batch: int) -> Product:
    """As a convolution of 1x1 over an image of 1 x b pixels, for which oneDNN has the fastest kernel of those tried."""
    outputs, inputs = weight.shape
    ones, zeros = [1, 1], [0, 0]
    kernel = weight.contiguous().view(outputs, inputs, 1, 1)
    packed = torch.ops.mkldnn._reorder_convolution_weight(kernel, zeros, ones, ones, 1, [1, inputs, 1, batch])
    convolve = torch.ops.mkldnn._convolution_pointwise.binary

    def product(x: Tensor, y: Tensor) -> Tensor:
        """x [b, K] @ weight^T + y [b, N], as an image of b pixels."""
        image, added = _image(x), _image(y)
        out = convolve(image, added, packed, None, zeros, ones, ones, 1, "add", 1.0, None, [], None)
        rows: Tensor = out.permute(0, 2, 3, 1).view(y.shape)
        return rows

    return product


def _image(x: Tensor) -> Tensor:
    """[b, K] as [1, K, 1, b], channels last."""
    return x.view(1, 1, *x.shape).permute(0, 3, 1, 2)


def _pays(weight: Tensor, steps: int) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.float32
        and torch.backends.mkldnn.is_available()
        and weight.numel() * weight.element_size() >= _LEAST_BYTES
        and steps >= _LEAST_STEPS
    )
