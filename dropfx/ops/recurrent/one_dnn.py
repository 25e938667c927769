"""oneDNN's LSTM of one layer and direction, as torch.lstm runs it on a CPU in float32, opaque to compilers.

PyTorch 2.13 breaks where AOTAutograd traces torch.lstm to `aten.mkldnn_rnn_layer`.

    x [T, B, I'], w_ih [4H, I], w_hh [4H, H], b_ih and b_hh [4H], h0 and c0 [B, H] -> all h [T, B, H], the last h and c,
    and what oneDNN's backward needs, in its own format
    cols: the columns of w_ih that x has, or None for all; backward gathers them again

Only a run tells how large the last result is, and a compiler has to know it before. So `kept_size` runs the layer once
for each size, and its answer is an argument of the op. Where sizes vary there is no such number, and the bytes come at
the head of a buffer that is large enough as far as known. Should either be wrong, as in a graph that was compiled for
another processor, backward runs forward again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dropfx.ops.define import by, define, differentiable, first_derivative_only
from dropfx.ops.kept import Kept, save_kept, saved_kept
from dropfx.ops.runs import GatheredWeight

_LSTM = 2  # its mode
_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _layer(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    reverse: bool,
    size: int | None,
    cols: Kept | None = None,
) -> _Results:
    operands = _operands([x, w_ih, w_hh, b_ih, b_hh, h0, c0], GatheredWeight(w_ih, None, cols))
    out, h, c, kept = _run(operands, reverse)
    return out.contiguous(), h.clone(), c.clone(), *_boxed(kept, _bound(x, w_hh) if size is None else size)


def _operands(tensors: list[Tensor], weight: GatheredWeight) -> list[Tensor]:
    """As oneDNN takes them: of W_ih the kept columns, and all in float32, for autocast may have been here."""
    x, w_ih, *others = tensors
    return [t.float().contiguous() for t in (x, weight.gather(w_ih), *others)]


def _run(tensors: list[Tensor], reverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.enable_grad():  # else it keeps nothing for backward
        made = torch.ops.aten.mkldnn_rnn_layer(
            *tensors, reverse, [], _LSTM, tensors[2].size(1), 1, True, False, False, True
        )
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], made)


@functools.lru_cache
def kept_size(steps: int, batch: int, inputs: int, units: int) -> int:
    """Bytes of what oneDNN keeps for backward, on this machine."""
    with unset_fake_temporarily():
        weights = [torch.zeros(4 * units, width) for width in (inputs, units)]
        bias, state = torch.zeros(4 * units), torch.zeros(batch, units)
        tensors = [torch.zeros(steps, batch, inputs), *weights, bias, bias, state, state]
        return _run(tensors, reverse=False)[-1].numel()


def _bound(x: Tensor, w_hh: Tensor) -> Any:
    """A little over what oneDNN 3 keeps: 16 rows of padded width per time step and sample."""
    steps, batch, inputs = x.shape
    width = torch.sym_max(inputs, w_hh.size(1)) + 48  # rows are padded to 16 floats, and off multiples of 256
    return 64 * (steps + 1) * batch * width + 65536  # each of its parts begins a page


def _boxed(kept: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`size` bytes that begin with those kept, and how many these are: 0 where there is no room."""
    used = kept.numel() if kept.numel() <= size else 0
    if used != size:
        kept, all_kept = kept.new_empty(size), kept
        kept[:used] = all_kept[:used]
    return kept, torch.tensor(used)


def _layer_fake(x: Tensor, w_ih: Tensor, w_hh: Tensor, *rest: Any) -> _Results:
    _, _, h0, c0, _, size, *_ = rest
    shapes = (*x.shape[:2], w_hh.size(1)), h0.shape, c0.shape
    out, h, c = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    kept = x.new_empty(_bound(x, w_hh) if size is None else size, dtype=torch.uint8)
    return out, h, c, kept, x.new_empty((), dtype=torch.int64)


def _layer_backward(
    grad: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    tensors: list[Tensor],
    results: list[Tensor],
    reverse: bool,
    cols: Kept | None,
    mask: list[bool],
) -> list[Tensor]:
    weight = GatheredWeight(tensors[1], None, cols)
    operands = _operands(tensors, weight)
    given = [None if g is None else g.contiguous() for g in (grad, grad_h, grad_c)]
    *outputs, kept, used = results
    kept = kept[: int(used)] if used else _run(operands, reverse)[-1]
    units = outputs[1].size(1)
    made = torch.ops.aten.mkldnn_rnn_layer_backward(
        *operands, *outputs, *given, reverse, _LSTM, units, 1, True, True, False, [], False, kept
    )
    grads = [g.to(t.dtype) for g, t in zip(made, tensors, strict=True)]
    if mask[1]:
        grads[1] = weight.scatter(grads[1]).contiguous()
    grads[4] = grads[4].clone()  # the two biases have one gradient, which an op may not return twice
    return [g for g, asked in zip(grads, mask, strict=True) if asked]


def _layer_backward_fake(*args: Any) -> list[Tensor]:
    *_, tensors, _, _, _, mask = args
    return [t.new_empty(t.shape) for t, asked in zip(tensors, mask, strict=True) if asked]


lstm_layer_op = define("lstm_layer", _layer, _layer_fake)
_backward_op = define("lstm_layer_backward", _layer_backward, _layer_backward_fake)
first_derivative_only(_backward_op, instead="dropfx.compile(model), which calls torch.lstm, has one")


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, _, cols = inputs
    save_kept(ctx, cols, tensors=(*tensors, *output))
    ctx.set_materialize_grads(False)


def _formula(ctx: Any, grad: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, *_: Any) -> Any:
    (cols,), saved = saved_kept(ctx)
    mask = list(ctx.needs_input_grad[:7])
    given = grad, grad_h, grad_c, saved[:7], saved[7:]
    made = iter(by(_backward_op)(*given, ctx.reverse, cols, mask))
    return [next(made) if asked else None for asked in mask]


differentiable(lstm_layer_op, _save, _formula)
