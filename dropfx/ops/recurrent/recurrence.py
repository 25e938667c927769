"""h_t, c_t = cell(pre_t, h_{t-1}, c_{t-1})        for all steps t; what the inputs add to the gates is given.

    kind "lstm" | "gru" | "rnn_tanh" | "rnn_relu"
    pre [T, B, G*H], or packed [N, G*H] with batch_sizes int64 [T]; h0 [B, P]; c0 [B, H] (LSTM)
    -> all hidden states [T, B, P] or [N, P], the last h [B, P] and c [B, H]
Parameters as `cells` names them. W_hh may be compact: `rows` and `cols` are what a dropped one keeps, which is added
to the gates and read of h. Splitting off the product of the inputs lets the Linear machinery
gather it, for all steps at once; what is left is bound by the weight W_hh, read at every step (`product`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropfx.errors import DoubleBackwardError
from dropfx.ops.define import by, define, differentiable, eager, first_derivative_only, padded, whole
from dropfx.ops.kept import Kept, save_kept, saved_kept
from dropfx.ops.recurrent import gru, lstm, rnn
from dropfx.ops.recurrent.cells import Flows, Saved, Weights
from dropfx.ops.recurrent.steps import Steps, steps_of
from dropfx.ops.runs import gather

_INSTEAD = "the torch.nn module has one: run the model without dropfx, as after dropfx.restore(model)"


def _walk(kind: str, pre: Tensor, h: Tensor, c: Tensor, weights: Weights, steps: Steps) -> tuple[Tensor, Saved]:
    if kind == "lstm":
        return lstm.forward(pre, h, c, weights, steps)
    if kind == "gru":
        return gru.forward(pre, h, c, weights, steps)
    return rnn.forward(kind, pre, h, weights, steps)


def _walk_back(kind: str, grad: Tensor, dh: Tensor, dc: Tensor, saved: Saved, weights: Weights, steps: Steps) -> Flows:
    if kind == "lstm":
        return lstm.backward(grad, dh, dc, saved, weights, steps)
    if kind == "gru":
        return gru.backward(grad, dh, dc, saved, weights, steps)
    return rnn.backward(kind, grad, dh, saved, weights, steps)


def _dtypes(
    kind: str, pre: Tensor, h0: Tensor, c0: Tensor | None, w_hr: Tensor | None, batch_sizes: Tensor | None
) -> tuple[torch.dtype, torch.dtype]:
    """What a recurrence computes in, and the dtype of its hidden states, as PyTorch has it under autocast.

    Autocast casts the products alone; on a CPU the steps of PyTorch's own promote what they add to their state, which
    a GRU's is h and an LSTM's c. cuDNN, and oneDNN for whole layers of LSTM, take and give the dtype of the products.
    """
    if pre.device.type == "cpu" and kind == "gru":
        promoted = torch.promote_types(pre.dtype, h0.dtype)
        return promoted, promoted
    by_one_dnn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if pre.device.type != "cpu" or c0 is None or (w_hr is None and batch_sizes is None and by_one_dnn):
        return pre.dtype, pre.dtype
    promoted = torch.promote_types(pre.dtype, c0.dtype)
    return promoted, promoted if w_hr is None else pre.dtype  # a projection is a product


def _run(
    kind: str,
    pre: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """All in one dtype, of `pre` or of the states: autocast may be on."""
    dtype, hidden = _dtypes(kind, pre, h0, c0, weights.hr, batch_sizes)
    like: dict[str, Any] = {"dtype": dtype, "copy": True, "memory_format": torch.contiguous_format}
    pre, h = pre.to(dtype), h0.to(**like)
    c = pre.new_empty(0) if c0 is None else c0.to(**like)
    steps = steps_of(pre.shape, batch_sizes, reverse)
    with torch.autocast(pre.device.type, enabled=False):
        out, saved = _walk(kind, pre.reshape(-1, pre.size(-1)), h, c, weights.cast(dtype), steps)
    return out.to(hidden), h.to(hidden), c, saved


def _gradients(
    kind: str,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    saved: Saved,
    weights: Weights,
    steps: Steps,
    mask: list[bool],
) -> list[Tensor | None]:
    """Of pre [N, G*H], h0, c0, W_hh, b_hh and W_hr, where the mask asks for them; None where it does not."""
    rows, width = saved.before.shape
    made = saved.before
    grad = made.new_zeros(rows, width) if grads[0] is None else grads[0].reshape(rows, width).to(made.dtype)
    batch = max(steps.sizes)
    like: dict[str, Any] = {"dtype": made.dtype, "copy": True, "memory_format": torch.contiguous_format}
    dh = made.new_zeros(batch, width) if grads[1] is None else grads[1].to(**like)
    dc = made.new_zeros(batch, saved.inner.size(-1)) if grads[2] is None else grads[2].to(**like)
    flows = _walk_back(kind, grad, dh, dc, saved, weights.cast(made.dtype), steps)
    made_by: list[Any] = [
        lambda: flows.pre,
        lambda: dh,
        lambda: dc,
        lambda: (_kept(flows.added, weights.rows).t() @ _kept(saved.before, weights.cols)).to(weights.hh.dtype),
        lambda: flows.added.sum(0).to(weights.hh.dtype),
        lambda: (flows.hidden.t() @ lstm.unprojected(saved)).to(weights.hh.dtype),
    ]
    return [make() if asked else None for make, asked in zip(made_by, mask, strict=True)]


def _kept(x: Tensor, kept: Kept | None) -> Tensor:
    return x if kept is None else gather(x, 1, kept)


# -- for compilers --------------------------------------------------------------------------------------------------

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _recurrence(
    kind: str,
    pre: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    rows: Kept | None = None,
    cols: Kept | None = None,
) -> _Outputs:
    weights = Weights(w_hh, b_hh, w_hr, rows, cols)
    out, h, c, saved = _run(kind, pre, h0, c0, weights, batch_sizes, reverse)
    return out.view(*pre.shape[:-1], out.size(1)), h, c, *saved


def _recurrence_fake(kind: str, pre: Tensor, h0: Tensor, c0: Tensor | None, *rest: Any) -> _Outputs:
    _, _, w_hr, batch_sizes, *_ = rest
    dtype, hidden = _dtypes(kind, pre, h0, c0, w_hr, batch_sizes)
    flat = pre.new_empty(pre.shape[:-1].numel(), pre.size(-1), dtype=dtype)
    out = pre.new_empty(*pre.shape[:-1], h0.size(1), dtype=hidden)
    c = flat.new_empty(0 if c0 is None else c0.shape)
    return out, pre.new_empty(h0.shape, dtype=hidden), c, *Saved.empty(kind, flat, h0)


def _recurrence_backward(
    kind: str,
    grad: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    gates: Tensor,
    before: Tensor,
    inner: Tensor,
    squashed: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    rows: Kept | None,
    cols: Kept | None,
    mask: list[bool],
) -> list[Tensor]:
    weights = Weights(w_hh, b_hh, w_hr, rows, cols)
    saved = Saved(gates, before, inner, squashed)
    batch = h0.size(0)
    steps = steps_of((before.size(0) // batch if batch else 1, batch), batch_sizes, reverse)
    grads = _gradients(kind, (grad, grad_h, grad_c), saved, weights, steps, mask)
    return [g for g in grads if g is not None]


def _recurrence_backward_fake(kind: str, *args: Any) -> list[Tensor]:
    _, _, _, gates, before, _, _, h0, c0, w_hh, b_hh, w_hr, *_, mask = args
    shapes = [tuple(gates.shape), h0.shape, c0, w_hh, b_hh, w_hr]
    return [
        before.new_empty(s if isinstance(s, tuple) else s.shape, dtype=before.dtype if place < 3 else w_hh.dtype)
        for place, (s, asked) in enumerate(zip(shapes, mask, strict=True))
        if asked and s is not None
    ]


recurrence_op = define("recurrence", _recurrence, _recurrence_fake)
recurrence_backward_op = define("recurrence_backward", _recurrence_backward, _recurrence_backward_fake)
first_derivative_only(recurrence_backward_op, instead=_INSTEAD)

_PLACES = (1, 2, 3, 4, 5, 6)
"""Arguments of the op that may ask for a gradient: pre, h0, c0, W_hh, b_hh, W_hr."""


def _save(ctx: Any, inputs: Sequence[Any], output: _Outputs) -> None:
    ctx.kind, pre, h0, c0, w_hh, b_hh, w_hr, batch_sizes, ctx.reverse, rows, cols = inputs
    ctx.mask, ctx.shape = [ctx.needs_input_grad[place] for place in _PLACES], pre.shape
    out, _, _, gates, *saved = output
    gates = out.view(-1, out.size(-1)) if ctx.kind.startswith("rnn") else gates
    save_kept(ctx, rows, cols, tensors=(gates, *saved, h0, c0, w_hh, b_hh, w_hr, batch_sizes))
    ctx.set_materialize_grads(False)


def _formula(ctx: Any, grad: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, *_: Any) -> Any:
    """The derivative by the registered op; nothing reads what is saved, which has no gradient."""
    axes, tensors = saved_kept(ctx)
    backward = by(recurrence_backward_op)
    made = iter(backward(ctx.kind, grad, grad_h, grad_c, *tensors, ctx.reverse, *axes, ctx.mask))
    grads = [next(made) if asked else None for asked in ctx.mask]
    if grads[0] is not None:
        grads[0] = grads[0].view(ctx.shape)
    return None, *grads


differentiable(recurrence_op, _save, _formula)


# -- eager ----------------------------------------------------------------------------------------------------------


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        pre: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        w_hh: Tensor,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        batch_sizes: Tensor | None,
        reverse: bool,
        rows: Kept | None,
        cols: Kept | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output [T, B, H], or [rows, H] of packed input, and the last states h and c, from the gates' input `pre`."""
        weights = Weights(w_hh, b_hh, w_hr, rows, cols)
        out, h, c, saved = _run(kind, pre, h0, c0, weights, batch_sizes, reverse)
        saved = saved._replace(gates=out) if kind.startswith("rnn") else saved
        ctx.kind, ctx.shape, ctx.steps = kind, pre.shape, steps_of(pre.shape, batch_sizes, reverse)
        ctx.mask = [ctx.needs_input_grad[place] for place in _PLACES]
        save_kept(ctx, rows, cols, tensors=(*saved, w_hh, b_hh, w_hr))
        ctx.set_materialize_grads(False)
        return whole(out.view(*pre.shape[:-1], out.size(1))), h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Gradients of pre, states and weights as far as they are asked for.

        Raises:
            DoubleBackwardError: under create_graph.
        """
        if torch.is_grad_enabled():
            raise DoubleBackwardError(f"a recurrence has no second derivative; {_INSTEAD}")
        axes, tensors = saved_kept(ctx)
        saved, weights = Saved(*tensors[:4]), Weights(*tensors[4:], *axes)
        made = _gradients(ctx.kind, (grads[0], grads[1], grads[2]), saved, weights, ctx.steps, ctx.mask)
        if made[0] is not None:
            made[0] = made[0].view(ctx.shape)
        return padded(ctx, None, *made)


eager(recurrence_op, _Recurrence)
