"""relu_(x); use(x) -> y = relu(x); use(y)        also where `use` reads a view of x, or x is itself a view

What aliases what is read off the storages of the fake values, those of operations with several results too. A write
that has no functional form, or into memory from outside of the graph, stays as it is, and all that shares its memory is
pinned: no later pass makes it compact.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from dropfx.graph.dropout_ops import DROPOUT_FUNCTIONS
from dropfx.graph.nodes import argument, op_name, value_of, writes_in_place
from dropfx.graph.notes import notes
from dropfx.graph.op_families import SPLITS
from dropfx.graph.pass_infra import Context, PassResult

_NO_FUNCTIONAL_FORM = frozenset(
    {"copy_", "fill_", "zero_", "set_", "resize_", "as_strided_", "detach_", "requires_grad_", "setitem"}
    | {"t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_"}
    | {"normal_", "uniform_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_"}
)
_REPLAYABLE = (
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "transpose",
    "permute",
    "t",
    "getitem",
    *(*SPLITS, "hsplit", "vsplit", "dsplit", "unbind"),
)
_INVERTIBLE = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")


@dataclass(frozen=True)
class _Reread:
    """Users of an alias that must read it anew: the written value viewed as `ancestor`, then through `steps`."""

    alias: fx.Node
    users: list[fx.Node]
    ancestor: fx.Node
    steps: list[fx.Node]


def functionalize(module: fx.GraphModule, context: Context) -> PassResult:
    """Replace writes in place by functional operations, and redirect later reads of the value and its views."""
    modified = False
    for node in list(module.graph.nodes):
        if writes_in_place(node):
            modified |= _functionalize(module.graph, node)
    return PassResult(module, modified)


def _functionalize(graph: fx.Graph, node: fx.Node) -> bool:
    target = argument(node, 0, "input")
    aliases = _aliases(graph, target)
    form = _functional(node) if aliases is not None and not _reads_what_it_writes(node, aliases) else None
    if aliases is None or form is None:
        _pin(graph, node)
        return False
    later = _later(node)
    rereads = []
    for alias in aliases - {node, target} - later:  # later ones derive from what is redirected here
        users = [user for user in alias.users if user in later and not _reads_another(user, aliases)]
        path = _path(target, alias, aliases) if users else None
        if path is not None and any(operand in later for step in path[1] for operand in step.all_input_nodes):
            path = None  # a view of sizes that are not known yet
        if path is not None:
            rereads.append(_Reread(alias, users, *path))
        elif users:
            _pin(graph, node)
            return False
    storage = _storage(notes(target)["val"])
    _replace(graph, node, target, form, rereads, later)
    _revalue(graph, storage)
    return True


def _revalue(graph: fx.Graph, storage: int) -> None:
    """Give fake values of their own to nodes that no longer share the written memory."""
    changed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or storage not in _storages(node):
            continue
        value = value_of(node)
        if "functional" in notes(node) and value is not None:
            notes(node)["val"] = value.detach().requires_grad_(value.requires_grad).clone()
            del notes(node)["functional"]
        elif any(operand in changed for operand in node.all_input_nodes):
            notes(node)["val"] = _evaluate(node)
        else:
            continue
        changed.add(node)


def _evaluate(node: fx.Node) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: notes(n)["val"])
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _replace(
    graph: fx.Graph,
    node: fx.Node,
    target: fx.Node,
    form: tuple[Any, Any, Any],
    rereads: list[_Reread],
    later: set[fx.Node],
) -> None:
    with graph.inserting_before(node):
        new = graph.create_node(node.op, *form)
        new.meta = {**node.meta, "functional": True}
        values = {reread.alias: _view_anew(graph, new, target, reread) for reread in rereads}
    for user in [user for user in target.users if user in later]:
        user.replace_input_with(target, new)
    for reread in rereads:
        for user in reread.users:
            user.replace_input_with(reread.alias, values[reread.alias])
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _view_anew(graph: fx.Graph, new: fx.Node, target: fx.Node, reread: _Reread) -> fx.Node:
    value = new
    if reread.ancestor is not target:
        value = graph.call_method("view_as", (new, reread.ancestor))
        value.meta = dict(reread.ancestor.meta)
    for step in reread.steps:
        copies = {step.args[0]: value}
        value = graph.node_copy(step, lambda n, copies=copies: copies.get(n, n))  # type: ignore[misc]
    return value


def _path(target: fx.Node, alias: fx.Node, aliases: set[fx.Node]) -> tuple[fx.Node, list[fx.Node]] | None:
    """How to get `alias` from `target`: up through reshapes to a common ancestor, then down through views."""
    ancestors = [target]
    while op_name(ancestors[-1]) in _INVERTIBLE and ancestors[-1].args[0] in aliases:
        ancestors.append(ancestors[-1].args[0])  # type: ignore[arg-type]
    down: list[fx.Node] = []
    step = alias
    while step not in ancestors:
        if op_name(step) not in _REPLAYABLE or step.args[0] not in aliases:
            return None
        down.insert(0, step)
        step = step.args[0]  # type: ignore[assignment]
    return step, down


def _functional(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """(target, args, kwargs) of the operation without the write, None where it has no such form."""
    name = op_name(node)
    if name in _NO_FUNCTIONAL_FORM or node.kwargs.get("out") is not None:
        return None
    if name == "bernoulli_":
        p = argument(node, 1, "p", 0.5)
        plain_p = isinstance(p, (int, float)) and _keeps_type(node)  # `bernoulli` takes no tensor of probabilities
        kwargs = {k: v for k, v in node.kwargs.items() if k != "p"}
        return ("bernoulli", (node.args[0], p), kwargs) if plain_p and node.op == "call_method" else None
    if name.endswith("_"):
        plain = name[:-1]
        owner = Tensor if node.op == "call_method" else torch
        if not hasattr(owner, plain):
            return None
        target = plain if node.op == "call_method" else getattr(torch, plain)
        return (target, node.args, node.kwargs) if _keeps_type(node) else None
    if name.startswith("i") and hasattr(operator, name) and node.target is getattr(operator, name):
        return (getattr(operator, name[1:]), node.args, node.kwargs) if _keeps_type(node) else None
    kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if "inplace" in node.kwargs:
        return node.target, node.args, kwargs
    if node.target in DROPOUT_FUNCTIONS:
        return node.target, (*node.args[:3], False), kwargs
    return node.target, tuple(False if a is True else a for a in node.args), kwargs


def _keeps_type(node: fx.Node) -> bool:
    """Whether the functional form has the written tensor's dtype and shape (in place neither can change)."""
    values = [v for a in node.all_input_nodes if (v := value_of(a)) is not None]
    first = values[0]
    tensors = all(torch.result_type(first, v) == first.dtype for v in values[1:])
    scalars = all(torch.result_type(first, a) == first.dtype for a in node.args[1:] if isinstance(a, (int, float)))
    return tensors and scalars


def _storage(value: Tensor) -> int:
    return int(StorageWeakRef(value.untyped_storage()).cdata)


def _storages(node: object) -> set[int]:
    """The memory of a node's value, be it one tensor or several."""
    value = notes(node).get("val") if isinstance(node, fx.Node) else None
    leaves = [value] if value is None or isinstance(value, Tensor) else pytree.tree_leaves(value)
    return {_storage(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout is torch.strided}


def _aliases(graph: fx.Graph, target: object) -> set[fx.Node] | None:
    """Nodes that share memory with target; None where memory from outside of the graph is among them."""
    value = value_of(target)
    if value is None:
        return None
    storage = _storage(value)
    found = {node for node in graph.nodes if storage in _storages(node)}
    return None if any(node.op in ("placeholder", "get_attr", "call_module") for node in found) else found


def _reads_another(node: fx.Node, aliases: set[fx.Node]) -> bool:
    """Whether it takes one of several results, and not one that was written."""
    several = node.target is operator.getitem and value_of(node.args[0]) is None
    return several and node not in aliases and value_of(node) is not None


def _reads_what_it_writes(node: fx.Node, aliases: set[fx.Node]) -> bool:
    """Whether another operand shares elements with the written one: what it reads depends on the order of writes."""
    target, *others = node.all_input_nodes
    shared = [other for other in others if other in aliases]
    return any(not _apart(value_of(target), value_of(other)) for other in shared)


def _apart(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two views of one memory are the same one, or chunks of it along one of their axes."""
    if first is None or second is None or first.stride() != second.stride():
        return False
    low, high = sorted((first, second), key=lambda view: int(view.storage_offset()))
    steps = int(high.storage_offset() - low.storage_offset())
    if steps == 0:
        return first.shape == second.shape and 0 not in first.stride()
    strides = [*sorted({int(stride) for stride in low.stride()}), low.untyped_storage().nbytes() // low.itemsize]
    for dim, stride in enumerate(low.stride()):
        if stride == 0 or steps % stride:
            continue
        room = strides[strides.index(int(stride)) + 1] // stride  # positions until the next one of a longer axis
        first_free, end = steps // stride, steps // stride + high.size(dim)
        if low.size(dim) <= first_free and end <= room:
            return True
    return False


def _pin(graph: fx.Graph, node: fx.Node) -> None:
    """A write that stays: all that shares memory with what it writes stays dense."""
    notes(node)["pinned"] = True
    written = pytree.tree_leaves((argument(node, 0, "input"), node.kwargs.get("out")))
    storages = set[int]().union(*map(_storages, written))
    for other in graph.nodes:
        if not storages.isdisjoint(_storages(other)):
            notes(other)["pinned"] = True


def _later(node: fx.Node) -> set[fx.Node]:
    later = set()
    while node.next.op != "root":
        node = node.next
        later.add(node)
    return later
