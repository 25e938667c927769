"""How a unit axis passes through each operation: the table from which regions grow.

An operation is *unit-wise* on an axis when unit j of the output needs only unit j of the operands, and
*zero-preserving* when it gives 0 for units that are 0. Before a site unit-wise suffices, since dropped values are never
read; after it f(0) = 0 is needed too. Axes are counted from the end, so that broadcasting aligns them.
"""

from dropfx.graph.axis_rules.rule import AxisRule, Operands
from dropfx.graph.axis_rules.samples import samples_of_operands
from dropfx.graph.axis_rules.table import AXIS_RULES, COPIES, PERMUTATIONS, RESHAPES, rule_of
from dropfx.graph.axis_rules.views import axes_of_index, axes_of_permutation
from dropfx.graph.notes import UnitAxis

__all__ = [
    "AXIS_RULES",
    "COPIES",
    "RESHAPES",
    "PERMUTATIONS",
    "UnitAxis",
    "AxisRule",
    "Operands",
    "axes_of_index",
    "axes_of_permutation",
    "rule_of",
    "samples_of_operands",
]
