"""Names of the sites of a captured graph: the path of the module that drops, and the number of its call."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from dropfx.graph.dropout_ops import (
    BERNOULLI,
    DROPOUT_FUNCTIONS,
    DROPOUT_MODULES,
    OTHER_DROPOUTS,
    RECURRENT_FUNCTIONS,
    UNIFORM,
    Call,
)
from dropfx.graph.nodes import op_name

_OTHER_MODULES = (nn.AlphaDropout, nn.FeatureAlphaDropout)


class Naming:
    """Names of what drops in a captured graph and in the checkpoints inside of it, and of the inputs that they add.

    Args:
        nodes: of Dynamo's graph, those of the checkpoints' bodies among them, in the order of the forward.
        paths: id of a module -> its path in the model, where that is known.
        root: path of the module whose forward was captured.

    Attributes:
        sites, recurrent, bernoulli, others: node -> its call; others can be no sites.
        calls: calls of everything that counts them.
    """

    def __init__(self, nodes: list[fx.Node], paths: Mapping[int, str] | None = None, root: str = "") -> None:
        self.sites: dict[fx.Node, Call] = {}
        self.recurrent: dict[fx.Node, Call] = {}
        self.bernoulli: dict[fx.Node, Call] = {}
        self.others: dict[fx.Node, Call] = {}
        self.calls: Counter[str] = Counter()
        self._paths, self._root = paths or {}, root
        self._inputs = itertools.count()
        for node in nodes:
            if node.op == "call_function" and node.target in DROPOUT_FUNCTIONS:
                path, cls = self._owner(node)
                self.sites[node] = self._call(path if cls in DROPOUT_MODULES else f"{path}:dropout")
            elif node.op == "call_function" and node.target in RECURRENT_FUNCTIONS:
                self.recurrent[node] = self._call(self._owner(node)[0])
            elif node.op == "call_function" and node.target in OTHER_DROPOUTS:
                path, cls = self._owner(node)
                self.others[node] = self._call(path if cls in _OTHER_MODULES else f"{path}:{op_name(node)}")
            elif op_name(node) in BERNOULLI:
                self.bernoulli[node] = self._call(f"{self._owner(node)[0]}:bernoulli")
            elif op_name(node) in UNIFORM:
                self.bernoulli[node] = self._call(f"{self._owner(node)[0]}:rand")

    @property
    def drops(self) -> bool:
        """Whether anything in the graph drops, or may be a mask."""
        return bool(self.sites or self.recurrent or self.bernoulli or self.others)

    def _call(self, what: str) -> Call:
        self.calls[what] += 1
        return Call(what, self.calls[what])

    def _owner(self, node: fx.Node) -> tuple[str, Any]:
        """Path and class of the innermost module whose forward makes this call."""
        stack = list((node.meta.get("nn_module_stack") or {}).items())
        if not stack:
            return self._root, None
        key, (path, cls) = stack[-1]
        number = str(key).partition("@")[0]  # the module's id; "@1" marks its second call
        known = self._paths.get(int(number)) if number.isdigit() else None
        return re.sub(r"^[LG]\['\w+'\]\.?", "", path) if known is None else known, cls

    def input_name(self, field: str) -> str:
        """A name for a new input of the graph, which no other input has; `field`: what of a draw it is."""
        return f"dropfx_{field}_{next(self._inputs)}"
