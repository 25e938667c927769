"""x + f(x) * mask [B, 1, 1] -> add_rows(x, f(take_rows(x, rows)), rows)        the branch runs on the kept rows alone

Stochastic depth, DropPath: a mask of one value a sample. The trunk is read by one gather and added to by one sum, never
written into. These sites come before those of units, which find the branch as if the model had written it so.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from dropfx.graph.axis_rules import UnitAxis
from dropfx.graph.dropout_ops import OF_ELEMENTS
from dropfx.graph.emit import fake_value
from dropfx.graph.layers import multiplies
from dropfx.graph.nodes import argument, insert, mark_gradients, memory_order, op_name, value_of
from dropfx.graph.notes import notes
from dropfx.graph.op_families import SUMS
from dropfx.graph.pass_infra import Context, PassResult, Site
from dropfx.graph.view_sizes import SIZES_AFTER, name_size, names_size, sizes_of_model
from dropfx.ops.rows import add_rows, dropout_of_rows, put_rows, take_rows
from dropfx.patterns import Rows
from dropfx.planning.cost_model import products_flops
from dropfx.planning.row_masks import RowMask, row_masks
from dropfx.planning.row_regions import Branch, feeding, grow, saves_work, worth

ROWS = Rows()


def skip_rows(module: fx.GraphModule, context: Context) -> PassResult:
    """Add the row sites to context.sites, and rewrite those whose branch is worth it."""
    modified = False
    mark_gradients(module.graph)
    for mask in row_masks(module.graph):
        site = _site(mask)
        context.sites.append(site)
        branch = None if site.reason else _branch(site, mask, context)
        if branch is None:
            notes(mask.chain[0])["by_rows"] = True
        else:
            _Rewriting(module.graph, site, mask, branch, context).run()
            modified = True
    return PassResult(module, modified)


def _site(mask: RowMask) -> Site:
    value = value_of(mask.x)
    assert value is not None
    site = Site(mask.call, mask.rate, node=mask.product, pattern=ROWS, kept=mask.kept, mask_value=mask.value)
    site.device, site.dtype, site.rank, site.by_rows = value.device, value.dtype, value.dim(), True
    if mask.dim is None:
        site.reason = "one random number decides for the whole batch: there are no rows to skip"
        return site
    site.axis, site.leading = mask.dim - value.dim(), value.size(mask.dim)
    if site.leading < 2:
        site.reason = f"a batch of {site.leading} row(s) has none to skip beside one that runs"
        return site
    captured = any("example_value" in node.meta for node in mask.product.graph.find_nodes(op="placeholder"))
    if captured and "example_value" not in mask.product.meta:
        site.reason = "its shape is known only when the graph runs"
        return site
    site.fit = ROWS.fit(site.leading, site.rate)
    return site


def _branch(site: Site, mask: RowMask, context: Context) -> Branch | None:
    """What runs on kept rows; None where the site runs as written, with its reason."""
    if context.options.pattern.drops_weights:
        site.reason = "it drops rows, and pattern='tile' drops parts of weights"
        return None
    if not context.knows_batches:
        site.reason = "how many samples a call has is known only inside of a graph of torch.fx"
        return None
    branch = grow(mask, UnitAxis(site.axis))
    written, planned = worth(branch, mask, site.rate, context)
    site.predicted_speedup = written / planned
    if not saves_work(branch):
        site.reason = "no layer of its branch could skip rows"
    elif site.predicted_speedup < context.options.min_speedup:
        least = context.options.min_speedup
        site.reason = f"predicted speed-up {site.predicted_speedup:.2f} is below min_speedup={least:g}"
    if site.reason:
        site.reason += f": {branch.ends[-1]}" if branch.ends and not saves_work(branch) else ""
        return None
    site.seconds_saved = written - planned
    _count_flops(branch, site, context)
    return branch


def _count_flops(branch: Branch, site: Site, context: Context) -> None:
    """Of the branch; what the graph no longer shows of its layers is part of the model as written."""
    for node in branch.axes:
        flops = products_flops(node)
        kept = round(flops * (1 - site.rate))
        site.flops_dense, site.flops_compact = site.flops_dense + flops, site.flops_compact + kept
        if multiplies(node):
            context.flops_dense += flops - kept


class _Rewriting:
    """One site's branch, from dense to kept rows."""

    def __init__(self, graph: fx.Graph, site: Site, mask: RowMask, branch: Branch, context: Context) -> None:
        self._graph, self._site, self._mask, self._branch = graph, site, mask, branch
        self._context, self._index = context, len(context.sites) - 1
        self._taken: dict[Any, fx.Node] = {}

    def run(self) -> None:
        """Rewrite the graph."""
        dead = feeding(self._mask)
        self._rows, self._scale = self._placeholders()
        self._kept = self._count(self._rows)
        self._keep_dense_sizes(dead)
        for node in self._branch.axes:
            self._on_rows(node)
        self._put_back()
        for node in reversed(list(self._graph.nodes)):
            if node in dead or node in self._mask.body:
                self._graph.erase_node(node)

    def _placeholders(self) -> tuple[fx.Node, fx.Node]:
        site, value = self._site, value_of(self._mask.x)
        assert site.fit is not None
        assert value is not None
        first = next(node for node in self._graph.nodes if node.op != "placeholder")
        with self._graph.inserting_before(first):
            draw = {field: self._graph.placeholder(f"{field}_{self._index}") for field in ROWS.fields}
        self._context.draws[self._index] = draw
        count = min(max(round(site.fit.units * site.fit.keep), 1), site.fit.units)
        rows = fake_value("new_empty", value, (count,)).to(torch.int64)
        draw["rows"].meta = {"val": rows, "after_effects": 0}
        draw["scale"].meta = {"val": 1.0, "after_effects": 0}
        return draw["rows"], draw["scale"]

    def _count(self, rows: fx.Node) -> fx.Node:
        """How many rows are kept."""
        first = next(iter(self._branch.axes))
        with self._graph.inserting_before(first):
            kept = self._graph.call_method("size", (rows, 0))
        kept.meta = {"val": notes(rows)["val"].size(0), "after_effects": 0}
        return kept

    def _keep_dense_sizes(self, dead: set[fx.Node]) -> None:
        """Who asks a value of the branch for the batch's size gets it from one outside."""
        for node, axis in self._branch.axes.items():
            value = value_of(node)
            for user in list(node.users):
                if op_name(user) != "size" or user in dead or value is None or len(user.args) != 2:
                    continue
                dim = user.args[1]
                assert isinstance(dim, int)
                if dim % value.dim() == value.dim() + axis.dim:
                    user.replace_all_uses_with(self._length(axis.factor, user))
                    self._graph.erase_node(user)

    def _length(self, factor: int, before: fx.Node) -> fx.Node:
        """The batch's size times a factor, as a node; asked of the first value from outside of the branch."""
        source, axis = min(self._branch.inputs, key=lambda taken: taken[0])
        value, emitted = value_of(source), self._graph
        assert value is not None
        with emitted.inserting_before(before):
            length = emitted.call_method("size", (source, value.dim() + axis.dim))
            length.meta = {**_place(before), "val": value.size(axis.dim)}
            for step, number in ((operator.floordiv, axis.factor), (operator.mul, factor)):
                if number != 1:
                    made = emitted.call_function(step, (length, number))
                    made.meta = {**length.meta, "val": step(notes(length)["val"], number)}
                    length = made
        return length

    def _on_rows(self, node: fx.Node) -> None:
        axis = self._branch.axes[node]
        for operand, at in self._branch.reads[node].items():
            if operand not in self._branch.axes:
                node.replace_input_with(operand, self._take(operand, at, node))
        if node.target in OF_ELEMENTS and notes(node)["site"].rate != 0:
            self._dropout_on_rows(node, axis)
        if op_name(node) == "view_as":
            sizes_of_model(node)
        if op_name(node) in SIZES_AFTER and names_size(node, axis.dim):
            name_size(node, axis.dim, self._times(axis.factor, node))
        notes(node)["val"] = _evaluated(node)

    def _dropout_on_rows(self, node: fx.Node, axis: UnitAxis) -> None:
        """One inside of the branch: a site for the passes behind this one, and where it stays the mask of all rows."""
        value, x, rate = value_of(node), argument(node, 0, "input"), argument(node, 1, "p", 0.5)
        assert value is not None
        length = self._length(axis.factor, node)
        order = memory_order(value)
        node.target = dropout_of_rows
        node.args = (x, rate, self._rows, value.dim() + axis.dim, axis.factor, length, order)
        node.kwargs = {}

    def _times(self, factor: int, before: fx.Node) -> fx.Node:
        if factor == 1:
            return self._kept
        with self._graph.inserting_before(before):
            made = self._graph.call_function(operator.mul, (self._kept, factor))
        made.meta = {**_place(before), "val": notes(self._kept)["val"] * factor}
        return made

    def _take(self, operand: fx.Node, axis: UnitAxis, reader: fx.Node) -> fx.Node:
        # under another grad mode or autocast it would be another value
        key = (operand, axis, notes(reader).get("after_effects"))
        if key not in self._taken or "pinned" in notes(operand):  # a write between two readers changes what they take
            value = value_of(operand)
            assert value is not None
            args = (operand, self._rows, value.dim() + axis.dim, axis.factor, memory_order(value))
            with self._graph.inserting_before(reader):
                made = insert(self._graph, take_rows, args, like=operand)
            made.meta = {**_place(reader), "val": _evaluated(made)}
            self._taken[key] = made
        return self._taken[key]

    def _put_back(self) -> None:
        product, x, site = self._mask.product, self._mask.x, self._site
        readers = list(product.users)
        if x not in self._branch.axes:
            x = self._take(x, UnitAxis(site.axis), product)
        dim = site.rank + site.axis
        base = _trunk(readers[0], product) if len(readers) == 1 else None
        if base is not None:
            (total,) = readers
            with self._graph.inserting_before(total):
                args: tuple[Any, ...] = (
                    base,
                    x,
                    self._rows,
                    dim,
                    self._scale,
                    site.kept,
                    memory_order(notes(total)["val"]),
                )
                made = insert(self._graph, add_rows, args, like=total)
            total.replace_all_uses_with(made)
            self._graph.erase_node(total)
        else:
            length = self._length(1, product)
            with self._graph.inserting_before(product):
                args = (x, self._rows, dim, length, self._scale, site.kept, memory_order(notes(product)["val"]))
                made = insert(self._graph, put_rows, args, like=product)
            product.replace_all_uses_with(made)


def _trunk(total: fx.Node, product: fx.Node) -> fx.Node | None:
    """What a sum adds the branch to, where both have one shape and dtype."""
    if op_name(total) not in SUMS[:1] or len(total.args) != 2 or total.kwargs or "pinned" in notes(total):
        return None
    base: Any = total.args[1] if total.args[0] is product else total.args[0]
    value, made, dropped = value_of(base), value_of(total), value_of(product)
    if value is None or made is None or dropped is None or not made.shape == value.shape == dropped.shape:
        return None
    return base if base is not product and made.layout == torch.strided else None


def _place(node: fx.Node) -> dict[str, Any]:
    return {"after_effects": notes(node).get("after_effects", 0)}


def _evaluated(node: fx.Node) -> Any:
    """The fake value of a node, from those of its operands as they are by now."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: notes(n)["val"])
    if node.op == "call_method":
        return fake_value(lambda *given: getattr(given[0], str(node.target))(*given[1:], **kwargs), *args)
    return fake_value(lambda *given: node.target(*given, **kwargs), *args)  # type: ignore[operator]
