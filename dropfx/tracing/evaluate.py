"""Fake values of the nodes that tracing records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from dropfx.graphs import argument, op_name
from dropfx.packed import FAKES
from dropfx.sizes import is_fixed
from dropfx.tracing.skeleton import Opaque, run
from dropfx.tracing.trace import UNKNOWN
from dropfx.tracing.watch import random_state, restore_random

if TYPE_CHECKING:
    from dropfx.tracing.tracer import Tracer

_UNKNOWABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


def evaluate(tracer: Tracer, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
    """The fake value of a node, on the tracer's skeleton; UNKNOWN where only running it would tell."""
    nodes: list[fx.Node] = []
    fx.node.map_arg((args, kwargs), lambda n: nodes.append(n) or n)  # type: ignore[func-returns-value]
    if any(n.meta["val"] is UNKNOWN for n in nodes) or isinstance(target, type):
        return UNKNOWN
    fake_args, fake_kwargs = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    state = random_state()
    with tracer.paused(), tracer.fake_mode:
        try:
            return _call(tracer, kind, target, fake_args, fake_kwargs)
        except _UNKNOWABLE:
            return UNKNOWN
        except Exception:
            if kind == "call_module":
                return UNKNOWN
            raise
        finally:
            restore_random(state)


def _call(tracer: Tracer, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
    if kind == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if kind == "call_module":
        module: Any = tracer.skeleton.get_submodule(target)
        return UNKNOWN if module._dropfx_class is Opaque else run(module, args, kwargs)
    return FAKES.get(target, target)(*args, **kwargs)


def counted_by_size(node: fx.Node) -> bool:
    """Whether a size that may vary decides how many tensors there are: the trace holds for this count alone."""
    name = op_name(node)
    if name not in ("chunk", "split", "unbind", "unsafe_chunk", "unsafe_split"):
        return False
    pieces = None if name == "unbind" else argument(node, 1, "chunks" if "chunk" in name else "split_size")
    if isinstance(pieces, (tuple, list)) or ("chunk" in name and pieces in (1, 2)):
        return False
    dim = argument(node, 1 if name == "unbind" else 2, "dim", 0)
    return not (isinstance(node.args[0], fx.Node) and isinstance(dim, int) and is_fixed(node.args[0], dim))
