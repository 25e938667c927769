"""oneDNN's LSTM of one layer and direction, as torch.lstm runs it on a CPU in float32, opaque to compilers.

PyTorch 2.13 breaks where AOTAutograd traces torch.lstm to `aten.mkldnn_rnn_layer`.

    x [T, B, I], w_ih [4H, I], w_hh [4H, H], b_ih and b_hh [4H], h0 and c0 [B, H] -> all h [T, B, H], the last h and c,
    and what oneDNN's backward needs, in its own format
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropfx.ops.define import define, first_derivative_only

_LSTM = 2  # its mode


def _layer(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, h0: Tensor, c0: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = [t.float().contiguous() for t in (x, w_ih, w_hh, b_ih, b_hh, h0, c0)]  # autocast may have been here
    with torch.enable_grad():  # else it keeps nothing for backward
        out, h, c, kept = torch.ops.aten.mkldnn_rnn_layer(
            *tensors, reverse, [], _LSTM, w_hh.size(1), 1, True, False, False, True
        )
    return out.contiguous(), h.clone(), c.clone(), kept


def _layer_fake(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, h0: Tensor, c0: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    shapes = (*x.shape[:2], w_hh.size(1)), h0.shape, c0.shape
    out, h, c = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return out, h, c, x.new_empty(size, dtype=torch.uint8)


def _layer_backward(
    grad: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    tensors: list[Tensor],
    results: list[Tensor],
    reverse: bool,
    mask: list[bool],
) -> list[Tensor]:
    contiguous = [t.float().contiguous() for t in tensors]
    given = [None if g is None else g.contiguous() for g in (grad, grad_h, grad_c)]
    *outputs, kept = results
    units = outputs[1].size(1)
    made = torch.ops.aten.mkldnn_rnn_layer_backward(
        *contiguous, *outputs, *given, reverse, _LSTM, units, 1, True, True, False, [], False, kept
    )
    # the two biases have one gradient, which an op may not return twice
    places = zip(made, tensors, mask, strict=True)
    return [g.to(t.dtype, copy=True) for g, t, asked in places if asked]


def _layer_backward_fake(
    grad: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    tensors: list[Tensor],
    results: list[Tensor],
    reverse: bool,
    mask: list[bool],
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, asked in zip(tensors, mask, strict=True) if asked]


lstm_layer_op = define("lstm_layer", _layer, _layer_fake)
_backward_op = define("lstm_layer_backward", _layer_backward, _layer_backward_fake)
first_derivative_only(_backward_op, instead="dropfx.compile(model), without a compiler, has that of torch.nn")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _formula(ctx: Any, grad: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, _: Any) -> Any:
    saved, mask = list(ctx.saved_tensors), list(ctx.needs_input_grad[:7])
    made = iter(_backward_op(grad, grad_h, grad_c, saved[:7], saved[7:], ctx.reverse, mask))
    return *(next(made) if asked else None for asked in mask), None


torch.library.register_autograd(lstm_layer_op, _formula, setup_context=_save)
