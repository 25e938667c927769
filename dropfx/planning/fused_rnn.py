"""Which recurrences PyTorch has fused, as cuDNN or oneDNN, rather than step by step."""

from __future__ import annotations

import torch
from torch import fx

from dropfx.graph.nodes import value_of
from dropfx.graph.pass_infra import Context


def in_one_piece(node: fx.Node, context: Context) -> bool:
    """Whether PyTorch has the kind of a `dropfx::recurrence` fused on the device, and the graph may call it."""
    kind, pre, _, _, _, _, w_hr, batch_sizes, reverse, *_ = node.args
    value = value_of(pre)
    packed = batch_sizes is not None
    if value is None or (reverse and packed):  # no function visits packed rows backwards alone
        return False
    if value.device.type == "cuda":
        return bool(torch.backends.cudnn.is_available())
    # for compilers there is an op of one layer of padded rows
    one_dnn = value.device.type == "cpu" and torch.backends.mkldnn.is_available() and (context.eager or not packed)
    return one_dnn and kind == "lstm" and w_hr is None and value.dtype is torch.float32
