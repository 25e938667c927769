"""Gathered ops: what a rewritten graph calls."""

from dropfx.ops.define import EAGER, flat, grouped
from dropfx.ops.embedding import embedding_op
from dropfx.ops.gathered_linear import gathered_linear
from dropfx.ops.gathered_weight import gathered_weight_op
from dropfx.ops.kept import Kept
from dropfx.ops.linear import linear_op
from dropfx.ops.recurrent.as_written import recurrent_as_written_op
from dropfx.ops.recurrent.buffer import in_one_buffer
from dropfx.ops.recurrent.one_dnn import kept_size, lstm_layer_op
from dropfx.ops.recurrent.recompute_gather import recompute_gather
from dropfx.ops.recurrent.recurrence import recurrence_op
from dropfx.ops.residual import residual_add_op
from dropfx.ops.tiles import tiled_linear_op
from dropfx.ops.units import gather_op, scale_units, scatter_op, spread_rows

__all__ = [
    "EAGER",
    "Kept",
    "embedding_op",
    "flat",
    "grouped",
    "recompute_gather",
    "in_one_buffer",
    "gathered_linear",
    "kept_size",
    "gathered_weight_op",
    "linear_op",
    "lstm_layer_op",
    "scatter_op",
    "recurrence_op",
    "recurrent_as_written_op",
    "residual_add_op",
    "scale_units",
    "spread_rows",
    "gather_op",
    "tiled_linear_op",
]
