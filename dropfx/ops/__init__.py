"""Gathered ops: what a rewritten graph calls (design section 7)."""

from dropfx.ops.define import EAGER
from dropfx.ops.embedding import embedding_op
from dropfx.ops.kept_linear import kept_linear
from dropfx.ops.kept_weight import kept_weight_op
from dropfx.ops.linear import linear_op
from dropfx.ops.recurrent.as_written import recurrent_as_written_op
from dropfx.ops.recurrent.buffer import in_one_buffer
from dropfx.ops.recurrent.gather_again import gather_again
from dropfx.ops.recurrent.one_dnn import kept_size, lstm_layer_op
from dropfx.ops.recurrent.recurrence import recurrence_op
from dropfx.ops.residual import residual_add_op
from dropfx.ops.tiles import tiled_linear_op
from dropfx.ops.units import put_op, scale_units, spread_rows, take_op

__all__ = [
    "EAGER",
    "embedding_op",
    "gather_again",
    "in_one_buffer",
    "kept_linear",
    "kept_size",
    "kept_weight_op",
    "linear_op",
    "lstm_layer_op",
    "put_op",
    "recurrence_op",
    "recurrent_as_written_op",
    "residual_add_op",
    "scale_units",
    "spread_rows",
    "take_op",
    "tiled_linear_op",
]
