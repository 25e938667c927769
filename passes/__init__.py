"""The passes, one per file. `PIPELINE` is their order, read top to bottom."""

if __name__ == "passes":
    raise ImportError("import dropfx.passes: `passes` from the project's root would be a second copy of each pass")

from dropfx.passes.canonicalize import canonicalize
from dropfx.passes.check_conversions import check_conversions
from dropfx.passes.check_plan import check_plan
from dropfx.passes.check_result import check_result
from dropfx.passes.drop_identities import drop_identities
from dropfx.passes.expand_cats import expand_cats
from dropfx.passes.expand_cells import expand_cells
from dropfx.passes.expand_recurrent import expand_recurrent
from dropfx.passes.find_sites import find_sites
from dropfx.passes.fold_masks import fold_masks
from dropfx.passes.fold_scale import fold_scale
from dropfx.passes.functionalize import functionalize
from dropfx.passes.fuse_activation import fuse_activation
from dropfx.passes.hoist_weight_gathers import hoist_weight_gathers
from dropfx.passes.insert_draws import insert_draws
from dropfx.passes.join_cats import join_cats
from dropfx.passes.join_cells import join_cells
from dropfx.passes.join_recurrent import join_recurrent
from dropfx.passes.keep_layouts import keep_layouts
from dropfx.passes.keep_rows import keep_rows
from dropfx.passes.keep_weights import keep_weights
from dropfx.passes.lower import lower
from dropfx.passes.plan_regions import plan_regions
from dropfx.passes.plan_tiles import plan_tiles
from dropfx.passes.recognise_masks import recognise_masks
from dropfx.passes.recognise_row_masks import recognise_row_masks
from dropfx.passes.rewrite_convolution import rewrite_convolution
from dropfx.passes.rewrite_embedding import rewrite_embedding
from dropfx.passes.rewrite_linear import rewrite_linear
from dropfx.passes.rewrite_recurrent import rewrite_recurrent
from dropfx.passes.rewrite_residual import rewrite_residual
from dropfx.passes.rewrite_sites import rewrite_sites
from dropfx.passes.rewrite_tiles import rewrite_tiles
from dropfx.passes.rewrite_views import rewrite_views
from dropfx.passes.skip_rows import skip_rows
from dropfx.passes.time_major import time_major

AS_WRITTEN = (functionalize, recognise_masks, keep_rows)
"""Gives masks made by hand the form of dropouts, which `dropfx.disabled` can turn off."""

# The phases:
#   functionalize to expand_cats       one form for what can be written in several ways
#   skip_rows                          the branches of row sites, which the passes behind it see on kept rows
#   find_sites to check_plan           what is decided: the sites, what is compact, which weights drop tiles
#   insert_draws to check_conversions  draws as inputs; gathers and scatters between compact and dense values
#   rewrite_views to rewrite_residual  one rewrite per kind of layer, acting only on the notes `form` and `reads`
#   join_recurrent to keep_layouts     undoing what did not pay, and folding: fold_masks before fold_scale before
#                                      hoist_weight_gathers, which reads the scale
#   lower to fuse_activation           the lowerings, and what needs their choice: keep_weights and fuse_activation
PIPELINE = (
    functionalize,
    recognise_masks,
    recognise_row_masks,
    expand_recurrent,
    expand_cells,
    time_major,
    drop_identities,
    canonicalize,
    expand_cats,
    skip_rows,
    find_sites,
    plan_regions,
    join_cats,
    plan_tiles,
    check_plan,
    insert_draws,
    rewrite_tiles,
    rewrite_sites,
    check_conversions,
    rewrite_views,
    rewrite_linear,
    rewrite_convolution,
    rewrite_embedding,
    rewrite_recurrent,
    rewrite_residual,
    join_recurrent,
    join_cells,
    fold_masks,
    fold_scale,
    hoist_weight_gathers,
    keep_layouts,
    lower,
    keep_weights,
    fuse_activation,
    check_result,
)
