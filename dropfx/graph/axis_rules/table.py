"""The rows, by operation."""

from __future__ import annotations

from torch import fx

from dropfx.graph.axis_rules.along import DIM, all_sources, along_rule, stack_keeps_first, stack_operands, stack_output
from dropfx.graph.axis_rules.pointwise import (
    all_operands,
    always,
    clamp_holds_zero,
    first_operand,
    first_output,
    hardtanh_holds_zero,
    never,
    numerator,
    pointwise,
    power_at_least_one,
    threshold_zero,
)
from dropfx.graph.axis_rules.rule import AxisRule
from dropfx.graph.axis_rules.spatial import FILTERS, PADDING, POSITIONS
from dropfx.graph.axis_rules.views import (
    first_stays,
    index_keeps_first,
    index_operands,
    index_output,
    permute_operands,
    permute_output,
    reshape_operands,
    reshape_output,
)
from dropfx.graph.layers import multiplies
from dropfx.graph.nodes import op_name, parts_of, value_of
from dropfx.graph.notes import notes
from dropfx.graph.op_families import CONVOLUTIONS, DIVISIONS, MULTIPLICATIONS, POOLS, SUMS

_ZERO_AT_ZERO = (
    "relu relu6 leaky_relu elu selu celu gelu silu mish tanh tanhshrink softsign hardswish hardshrink softshrink "
    "abs neg pos positive sin asin arcsin atan arctan tan sinh asinh square sign erf expm1 log1p floor ceil round trunc"
)
_NOT_ZERO_AT_ZERO = (
    "sigmoid logsigmoid hardsigmoid softplus exp exp2 log cos cosh rsqrt sqrt reciprocal where maximum minimum eq ne "
    "lt le gt ge masked_fill logical_not"
)
_COPIES = "contiguous clone detach to float double half bfloat16 type type_as cpu cuda alias resolve_conj resolve_neg"
COPIES = frozenset(_COPIES.split())
RESHAPES = frozenset(["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"])
PERMUTATIONS = frozenset(["transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "moveaxis"])

AXIS_RULES: dict[str, AxisRule] = {
    **{name: pointwise(always) for name in _ZERO_AT_ZERO.split()},
    **{name: pointwise(never) for name in _NOT_ZERO_AT_ZERO.split()},
    **{name: pointwise(always) for name in MULTIPLICATIONS},
    **{name: pointwise(all_operands) for name in SUMS},
    **{name: pointwise(numerator) for name in DIVISIONS},
    **{name: pointwise(clamp_holds_zero) for name in ("clamp", "clip")},
    "hardtanh": pointwise(hardtanh_holds_zero),
    "threshold": pointwise(threshold_zero),
    "pow": pointwise(power_at_least_one),
    **{name: AxisRule(first_operand, first_output, always) for name in COPIES},
    **{name: AxisRule(reshape_operands, reshape_output, always, lambda node: False) for name in RESHAPES},
    **{name: AxisRule(permute_operands, permute_output, always, first_stays, moves_rows=True) for name in PERMUTATIONS},
    "getitem": AxisRule(index_operands, index_output, always, index_keeps_first, moves_rows=True),
    "stack": AxisRule(stack_operands, stack_output, all_sources, stack_keeps_first, moves_rows=True),
    **dict.fromkeys([*POOLS, "interpolate"], POSITIONS),
    "pad": PADDING,
    **dict.fromkeys(CONVOLUTIONS, FILTERS),
    **{name: along_rule(never if "softmax" in name else all_sources) for name in DIM},
}
"""Operation name (as `nodes.op_name` gives it) -> its row. What has no row is dense."""


def rule_of(node: fx.Node) -> AxisRule | None:
    """The row of a node's operation, None where everything must be dense; "identity": a dropout of rate 0."""
    if notes(node).get("identity"):
        return AXIS_RULES["clone"]
    if (value_of(node) is None and parts_of(node) is None) or multiplies(node):
        return None
    return AXIS_RULES.get(op_name(node))
