"""Faults that the tests must find: a line of the library, what it becomes, and the tests that are asked first."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """In `file`, the one place with `text` becomes `faulty`; `tests` are folders or files, the nearest first."""

    file: str
    text: str
    faulty: str
    tests: str


FAULTS = (
    # -- ops
    Fault("dropfx/ops/parts.py", "alpha=scale, out=compact", "alpha=1.0, out=compact", "ops"),
    Fault("dropfx/ops/parts.py", "in reversed(list(enumerate(starts)))", "in list(enumerate(starts))", "ops"),
    Fault("dropfx/ops/parts.py", "dense[:end].zero_()", "pass", "ops"),
    Fault("dropfx/ops/parts.py", "dy.sum(0).to(self._kept.dtype)", "dy.mean(0).to(self._kept.dtype)", "ops"),
    Fault(
        "dropfx/ops/parts.py",
        "return scaled_mm(dy, compact.to(dy.dtype), scale)",
        "return scaled_mm(dy, compact.to(dy.dtype), 1.0)",
        "ops",
    ),
    Fault("dropfx/ops/parts.py", "self._by_group(dy).sum(1)", "self._by_group(dy).mean(1)", "ops"),
    Fault("dropfx/ops/parts.py", "tiles.index_add_(0", "tiles.index_copy_(0", "ops"),
    Fault("dropfx/ops/parts.py", "        done += len(part)\n", "", "ops"),
    Fault(
        "dropfx/ops/products.py",
        "and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))",
        "",
        "ops/test_products.py",
    ),
    Fault("dropfx/ops/products.py", "out.mul_(scale)", "out", "ops/test_products.py"),
    Fault("dropfx/planning/draw_count.py", "rate / (1 - rate)", "rate", "planning/test_draw_count.py"),
    Fault(
        "dropfx/ops/runs.py",
        "x.narrow(dim, 0, kept.run - tail)], dim)",
        "x.narrow(dim, 1, kept.run - tail)], dim)",
        "ops",
    ),
    Fault(
        "dropfx/ops/runs.py", ".index_add_(dim, kept.units(units), y)", ".index_copy_(dim, kept.units(units), y)", "ops"
    ),
    Fault(
        "dropfx/ops/kept.py",
        "size + (group < more)",
        "size + (group >= groups - more)",
        "ops catalogue/test_groups.py",
    ),
    Fault("dropfx/ops/kept.py", "if row < end), 0)", "if row <= end), 0)", "ops catalogue/test_groups.py"),
    Fault("dropfx/ops/groups.py", "longer = more * (size + 1)", "longer = more * size", "catalogue/test_groups.py"),
    Fault("dropfx/ops/residual.py", "scatter_groups(y * alpha, dim", "scatter_groups(y, dim", "ops"),
    Fault("dropfx/ops/embedding.py", "(where != padding_idx)", "(where == where)", "ops"),
    Fault("dropfx/ops/recurrent/lstm.py", "        cell.mul_(forget)\n", "", "ops"),
    Fault("dropfx/ops/recurrent/gru.py", "sigmoid_slope(saved.before - n, u", "sigmoid_slope(saved.before, u", "ops"),
    Fault("dropfx/ops/recurrent/rnn.py", "        before.copy_(h[:b])\n", "", "ops"),
    Fault("dropfx/ops/shared_dropout.py", "return input * drawn.div_(1 - p)", "return input * drawn", "passes"),
    # -- axis rules
    Fault(
        "dropfx/graph/axis_rules/table.py",
        'never if "softmax" in name else all_sources',
        "all_sources",
        "graph catalogue/test_equivalence.py",
    ),
    Fault(
        "dropfx/graph/axis_rules/table.py",
        "pointwise(never) for name in _NOT_ZERO_AT_ZERO",
        "pointwise(always) for name in _NOT_ZERO_AT_ZERO",
        "graph catalogue/test_equivalence.py",
    ),
    Fault(
        "dropfx/graph/axis_rules/views.py",
        "axis.factor * (length // source[position])",
        "axis.factor",
        "graph catalogue/test_equivalence.py",
    ),
    Fault(
        "dropfx/graph/axis_rules/pointwise.py",
        "all(isinstance(a, fx.Node) and a in zeros for a in node.args[:2])",
        "any(isinstance(a, fx.Node) and a in zeros for a in node.args[:2])",
        "graph catalogue/test_equivalence.py",
    ),
    Fault("dropfx/graph/axis_rules/pointwise.py", "<= 0 <= (high or 0)", "<= 1 <= (high or 1)", "graph catalogue"),
    # -- planning
    Fault("dropfx/planning/min_cut.py", "capacity=prices.scatter[value])", "capacity=0)", "planning"),
    Fault("dropfx/planning/regions.py", 'not notes(node).get("identity")', "True", "passes planning catalogue"),
    # -- draws and patterns
    Fault(
        "dropfx/patterns/base.py",
        "return unwrapped(self.starts, self.run) % self.fit.units",
        "return unwrapped(self.starts, self.run)",
        "draws patterns",
    ),
    Fault("dropfx/draws/draw_plan.py", "number = _mix(number + rank_step)", "number = number", "draws distributed"),
    Fault("dropfx/draws/draw_plan.py", "_signed(site_key(self.names[i]))", '_signed(site_key(""))', "draws"),
    Fault("dropfx/patterns/block.py", "drawn_rate=1.0 - count / blocks", "drawn_rate=count / blocks", "patterns"),
    Fault("dropfx/patterns/block.py", "hands.sort(dim=-1).values", "hands", "patterns draws"),
    Fault("dropfx/patterns/block.py", "        held = dealt % cards\n", "        held = 0\n", "patterns"),
    Fault("dropfx/patterns/base.py", "MAX_RATE_ERROR = 0.02", "MAX_RATE_ERROR = 0.2", "patterns draws"),
    # -- passes
    Fault("passes/fold_scale.py", " and own == 1.0", "", "passes catalogue/test_equivalence.py"),
    Fault("passes/drop_identities.py", ' or any(user.op == "output" for user in node.users)', "", "passes"),
    Fault("passes/rewrite_residual.py", "else -alpha)", "else alpha)", "passes catalogue/test_equivalence.py"),
    Fault(
        "passes/functionalize.py",
        '            notes(other)["pinned"] = True',
        "            pass",
        "passes promises/test_hunted.py",
    ),
    Fault("passes/keep_layouts.py", "if context.draws else []", "if False else []", "passes"),
    Fault("passes/expand_recurrent.py", '    if "pinned" in notes(node):', "    if False:", "promises/test_hunted.py"),
    Fault("passes/recognise_masks.py", "rate = round(1 - keep, 12)", "rate = round(keep, 12)", "passes"),
    Fault("passes/recognise_masks.py", "math.isclose(scale * keep, 1, rel_tol=1e-6)", "True", "passes"),
    Fault("passes/hoist_weight_gathers.py", "_gather(bias, rows, 0)", "bias", "passes"),
    Fault(
        "passes/rewrite_linear.py",
        "cols, rows = (None if",
        "rows, cols = (None if",
        "passes",
    ),
    Fault(
        "passes/find_sites.py",
        "if not 0 < site.rate < 1:",
        "if not 0 < site.rate:",
        "promises/test_bad_rates.py promises passes",
    ),
    Fault("passes/time_major.py", 'notes(site)["steps_second"] = True', "pass", "promises/test_time.py"),
    # -- front end
    Fault(
        "dropfx/frontend/captured_graph.py",
        "        if rates == self._rates:\n",
        "        if rates or not rates:\n",
        "promises/test_switches.py",
    ),
    Fault(
        "dropfx/frontend/naming.py", "return Call(what, self.calls[what])", "return Call(what, 1)", "frontend promises"
    ),
    Fault(
        "dropfx/frontend/capture.py",
        "            install_guard(LocalSource(name, is_input=True).make_guard(GuardBuilder.ID_MATCH))\n",
        "            pass\n",
        "frontend promises soundness",
    ),
    Fault(
        "dropfx/frontend/whole_calls.py",
        "0.5 if isinstance(value, torch.SymFloat) else value",
        "value",
        "promises frontend",
    ),
    # -- flat arguments, calls that are left alone, prices
    Fault("dropfx/ops/flat.py", "made += [starts, run]", "made += [starts, 1]", "ops/test_flat.py ops"),
    Fault(
        "dropfx/ops/flat.py",
        "*(leading if len(args) == len(self._kept) else ())",
        "*(0 for _ in leading)",
        "ops/test_flat.py catalogue/test_groups.py",
    ),
    Fault(
        "dropfx/frontend/left_alone.py",
        "return value.shape, value.dtype",
        "return value.dtype",
        "frontend/test_left_alone.py",
    ),
    Fault("dropfx/frontend/left_alone.py", "self._calls[kind] = calls + 1", "pass", "frontend/test_left_alone.py"),
    Fault(
        "dropfx/frontend/dynamo_graph.py",
        "put_in_place(user, node, float(numbers[source]))",
        "put_in_place(user, source, float(numbers[source]))",
        "frontend",
    ),
    Fault(
        "dropfx/planning/cost_model.py",
        "kept = costs.draw + 2 * costs.move(elements * keep, i",
        "kept = 2 * costs.move(elements * keep, i",
        "planning",
    ),
    Fault(
        "dropfx/planning/layer_times.py",
        "return costs.gathered + groups * (read",
        "return groups * (read",
        "planning/test_cost_model.py",
    ),
    # -- rows and channels
    Fault(
        "dropfx/passes/skip_rows.py",
        'if key not in self._taken or "pinned" in notes(operand)',
        "if key not in self._taken",
        "passes/test_skip_rows.py",
    ),
    Fault("dropfx/ops/rows.py", "part, alpha=scale * kept", "part, alpha=kept", "patterns passes/test_skip_rows.py"),
    Fault("dropfx/patterns/rows.py", "float(k > 0)", "1.0", "patterns/test_rows.py passes/test_skip_rows.py"),
    Fault(
        "dropfx/ops/rows.py",
        "return input * mask.index_select(dim, positions(rows, factor))",
        "return input * mask.narrow(dim, 0, input.size(dim))",
        "passes/test_skip_rows.py",
    ),
    Fault(
        "dropfx/draws/site_draws.py",
        "return whole.index_copy_(0, kept, mask)",
        "return mask",
        "passes/test_skip_rows.py",
    ),
    Fault(
        "dropfx/passes/rewrite_convolution.py",
        "((rows, -value.dim()), (cols, 1 - value.dim()))",
        "((cols, -value.dim()), (rows, 1 - value.dim()))",
        "passes/test_rewrite_convolution.py",
    ),
    Fault(
        "dropfx/passes/rewrite_convolution.py",
        "if order == tuple(sorted(order)) or order[0] != 0:",
        "if order:",
        "passes/test_rewrite_convolution.py",
    ),
    Fault(
        "dropfx/passes/rewrite_convolution.py",
        "(kept.starts, 0, k)",
        "(kept.starts, 0, 0)",
        "passes/test_rewrite_convolution.py",
    ),
    Fault(
        "dropfx/graph/axis_rules/spatial.py",
        'return argument(node, 2, "bias") is None',
        "return True",
        "catalogue/test_equivalence.py",
    ),
    Fault(
        "dropfx/graph/axis_rules/spatial.py",
        'return argument(node, 2, "mode", "constant") != "constant" or not argument(node, 3, "value", None)',
        "return True",
        "passes/test_rewrite_convolution.py",
    ),
    Fault(
        "dropfx/graph/layers.py",
        " and conv_groups(node) == 1  # type: ignore[union-attr]",
        "  # type: ignore[union-attr]",
        "passes/test_rewrite_convolution.py catalogue/test_equivalence.py",
    ),
    Fault(
        "dropfx/passes/rewrite_sites.py",
        "turned = order != sorted(order) and (order[0] == 0 or not kept.leading)",
        "turned = False",
        "passes/test_rewrite_convolution.py catalogue/test_equivalence.py",
    ),
)
