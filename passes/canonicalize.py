"""relu_(x); use(x) -> y = relu(x); use(y)        dropout(x, training=False) -> x        size(relu(x), 0) -> size(x, 0)

One form for later passes: nothing is written in place where that can be said functionally, no dropout that is off, and
sizes are asked of the first value that has them, so that asking does not force a value to be dense.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from dropfx.axis_rules import AXIS_RULES
from dropfx.graphs import argument, op_name, value_of, writes_in_place
from dropfx.pass_infra import Context, PassResult
from dropfx.sites import DROPOUT_FUNCTIONS

_NO_FUNCTIONAL_FORM = frozenset(
    "copy_ fill_ zero_ set_ resize_ t_ transpose_ squeeze_ unsqueeze_ swapaxes_ swapdims_ as_strided_ detach_ "
    "requires_grad_ normal_ uniform_ bernoulli_ random_ exponential_ geometric_ cauchy_ log_normal_ setitem".split()
)
_REPLAYABLE = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t", "getitem")
_INVERTIBLE = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")


def canonicalize(module: fx.GraphModule, context: Context) -> PassResult:
    """Bring the graph to the functional form that later passes match."""
    graph = module.graph
    modified = False
    for node in list(graph.nodes):
        if writes_in_place(node):
            modified |= _functionalise(graph, node)
    for node in list(graph.nodes):
        modified |= _drop_inactive(node) or _ask_size_at_source(node)
    return PassResult(module, modified)


def _drop_inactive(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in DROPOUT_FUNCTIONS:
        return False
    training = argument(node, 2, "train" if node.target is torch.dropout else "training", True)
    if training is not False or writes_in_place(node):
        return False
    node.replace_all_uses_with(argument(node, 0, "input"))
    node.graph.erase_node(node)
    return True


# -- sizes ----------------------------------------------------------------------------------------------------------


def _ask_size_at_source(node: fx.Node) -> bool:
    if op_name(node) != "size" or len(node.args) != 2 or not isinstance(node.args[1], int):
        return False
    source, dim = node.args
    value = value_of(source)
    if value is None or not isinstance(source, fx.Node) or not isinstance(dim, int):
        return False
    origin, at = _origin(source, dim % value.dim())
    if origin is source:
        return False
    node.args = (origin, at)
    return True


def _origin(source: fx.Node, dim: int) -> tuple[fx.Node, int]:
    while True:
        value, name = value_of(source), op_name(source)
        assert value is not None
        if name == "linear":
            if dim == value.dim() - 1:
                weight = argument(source, 1, "weight")
                return (weight, 0) if isinstance(weight, fx.Node) else (source, dim)
            source = argument(source, 0, "input")
            continue
        pointwise = name in AXIS_RULES or (source.op == "call_function" and source.target in DROPOUT_FUNCTIONS)
        same = [o for o in source.all_input_nodes if (v := value_of(o)) is not None and v.shape == value.shape]
        if not pointwise or not same or name in ("transpose", "permute", "t"):
            return source, dim
        source = same[0]


# -- writes in place ------------------------------------------------------------------------------------------------


def _functionalise(graph: fx.Graph, node: fx.Node) -> bool:
    target = argument(node, 0, "input")
    aliases = _aliases(graph, target)
    replaced = _functional(node) if aliases is not None else None
    if aliases is None or replaced is None or not isinstance(target, fx.Node):
        _pin(graph, node, target)
        return False
    later = _later(node)
    chains = {}
    for alias in aliases:
        users = [u for u in alias.users if u in later]
        if alias is node or alias is target or not users:
            continue
        chain = _path(target, alias, aliases)
        if chain is None:
            _pin(graph, node, target)
            return False
        chains[alias] = (users, chain)
    _apply(graph, node, target, replaced, chains, later)
    return True


def _apply(graph, node, target, replaced, chains, later):  # type: ignore[no-untyped-def]
    with graph.inserting_before(node):
        new = graph.create_node(node.op, replaced[0], replaced[1], replaced[2])
        new.meta = dict(node.meta)
        fresh = {}
        for alias, (users, (up, down)) in chains.items():
            value = new
            if up is not target:
                value = graph.call_method("view_as", (new, up))
                value.meta = dict(up.meta)
            for step in down:
                value = graph.node_copy(step, lambda n, source=step.args[0], value=value: value if n is source else n)
            fresh[alias] = (users, value)
    for user in [u for u in target.users if u in later]:
        user.replace_input_with(target, new)
    for alias, (users, value) in fresh.items():
        for user in users:
            user.replace_input_with(alias, value)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


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


def _functional(node: fx.Node):  # type: ignore[no-untyped-def]
    """(target, args, kwargs) of the operation without the write, None where it has no such form."""
    name = op_name(node)
    if name in _NO_FUNCTIONAL_FORM or "out" in node.kwargs:
        return None
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
    args = node.args if "inplace" in node.kwargs else tuple(False if a is True and i else a for i, a in enumerate(node.args))
    if node.target in DROPOUT_FUNCTIONS and "inplace" not in node.kwargs:
        args = (*node.args[:3], False)
    return node.target, args, kwargs


def _keeps_type(node: fx.Node) -> bool:
    """Whether the functional form has the written tensor's dtype and shape (in place neither can change)."""
    values = [v for a in node.all_input_nodes if (v := value_of(a)) is not None]
    first = values[0]
    tensors = all(torch.result_type(first, v) == first.dtype for v in values[1:])
    scalars = all(torch.result_type(first, a) == first.dtype for a in node.args[1:] if isinstance(a, (int, float)))
    return tensors and scalars


def _storage(value: Tensor) -> int:
    return StorageWeakRef(value.untyped_storage()).cdata


def _aliases(graph: fx.Graph, target: object) -> set[fx.Node] | None:
    """Nodes that share memory with target; None where memory from outside of the graph is among them."""
    value = value_of(target)
    if value is None:
        return None
    storage = _storage(value)
    found = set()
    for node in graph.nodes:
        other = value_of(node)
        if other is not None and _storage(other) == storage:
            if node.op in ("placeholder", "get_attr", "call_module"):
                return None
            found.add(node)
    return found


def _pin(graph: fx.Graph, node: fx.Node, target: object) -> None:
    """A write that stays: all that shares its memory stays dense."""
    node.meta["pinned"] = True
    value = value_of(target)
    for other in graph.nodes:
        shared = value_of(other)
        if value is not None and shared is not None and _storage(shared) == _storage(value):
            other.meta["pinned"] = True


def _later(node: fx.Node) -> set[fx.Node]:
    later = set()
    while node.next.op != "root":
        node = node.next
        later.add(node)
    return later
