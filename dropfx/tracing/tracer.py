"""The fx tracer: records a forward without baking in or losing anything (design section 4).

A module becomes opaque, that is, a call that runs as written, when its forward changes grad mode, autocast or
saved-tensor hooks (checkpoint), branches on random numbers or data, or writes attributes; the trace is then made again
around it. Everything plain that the trace reads from a module is guarded.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.overrides import is_tensor_method_or_property
from torch.utils import _pytree as pytree

from dropfx.graphs import op_name
from dropfx.packed import opened
from dropfx.sites import BERNOULLI, DROPOUT_FUNCTIONS, DROPOUT_MODULES, INLINED_MODULES, LEAF_MODULES, may_drop
from dropfx.tracing import recurrent
from dropfx.tracing.evaluate import counted_by_size, evaluate
from dropfx.tracing.proxies import LiveFloat, Proxy, ScalarProxy, TensorProxy, python_isinstance
from dropfx.tracing.refusal import TraceRefused, why
from dropfx.tracing.skeleton import Builder, Opaque, Recorder
from dropfx.tracing.surroundings import surroundings
from dropfx.tracing.trace import UNKNOWN, Guard, Trace
from dropfx.tracing.watch import contents, modes, random_state, restore_random, which_mode

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, str, type(None), torch.dtype, torch.device)


def hooked(module: nn.Module) -> bool:
    """Calling the module does more than its class' forward."""
    own = module.__dict__
    return "forward" in own or any(own.get(hooks) for hooks in _HOOKS)


def trace(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], original_class: Callable[[nn.Module], type]
) -> Trace:
    """Record root's forward on inputs like these; only their kinds and sizes are used.

    Raises:
        TraceRefused: root's own forward cannot be recorded.
    """
    opaque: dict[str, str] = {}
    while True:
        tracer = Tracer(root, original_class, opaque)
        try:
            return tracer.run(args, kwargs)
        except TraceRefused as refusal:
            if not refusal.path or refusal.path in opaque:
                raise
            if isinstance(root.get_submodule(refusal.path), INLINED_MODULES):
                raise TraceRefused(
                    refusal.reason, ""
                ) from refusal  # wrong inputs, most likely: the forward will say so
            opaque[refusal.path] = refusal.reason


class Tracer(fx.Tracer):
    """One attempt at recording one forward."""

    def __init__(self, root: nn.Module, original_class: Callable[[nn.Module], type], opaque: dict[str, str]) -> None:
        super().__init__()
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracing = False
        self.exact_shapes = False
        self.opaque = opaque
        self.graph = fx.Graph(tracer_cls=type(self))
        self._builder = Builder(self, original_class)
        self.original = root
        self.skeleton = self._builder.module(root)
        self._paths = {id(m): name for name, m in self.skeleton.named_modules()}
        self._stack: list[tuple[str, type]] = []
        self._calls: Counter[str] = Counter()
        self._functional: Counter[str] = Counter()
        self._draws: Counter[str] = Counter()
        self._recurrent: Counter[str] = Counter()
        self._guards: dict[tuple[Any, ...], Guard] = {}
        self._visited: dict[str, tuple[type, bool]] = {}
        self._leaves: dict[str, str] = {}
        self._attributes = self._attribute_paths()
        self._get_attr: dict[str, fx.Node] = {}
        self._read: set[tuple[str, str]] = set()

    def _attribute_paths(self) -> dict[int, str]:
        paths: dict[int, str] = {}
        for path, module in self.skeleton.named_modules():
            owners = (module._parameters, module._buffers, module.__dict__)
            for name, value in ((k, v) for owner in owners for k, v in owner.items()):
                if isinstance(value, Tensor):
                    paths.setdefault(id(value), f"{path}.{name}" if path else name)
        return paths

    # -- running the forward -------------------------------------------------------------------------------------

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        """Trace the forward for these inputs, tensors as placeholders.

        Raises:
            TraceRefused: the forward does what a graph would lose, or fix to what it is in this call.
        """
        leaves, in_spec = pytree.tree_flatten(opened((args, kwargs)))
        proxies = [self._placeholder(i, leaf) if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)]
        inputs, named = pytree.tree_unflatten(proxies, in_spec)
        python_random = random_state()
        with surroundings(self):
            self._modes = modes()
            out_spec = self._record_forward(inputs, named)
        if random_state() != python_random:
            restore_random(python_random)
            raise TraceRefused("its forward draws random numbers", "")
        self.graph.lint()
        return Trace(self.graph, out_spec, list(self._guards.values()), self._visited, self._leaves, self.exact_shapes)

    def _record_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> pytree.TreeSpec:
        with python_isinstance(), self._recording():
            out = self._inline(self.skeleton, "", args, kwargs)
            results, out_spec = pytree.tree_flatten(opened(out))
            self.graph.output(tuple(self._result(r) for r in results))
        return out_spec

    def _placeholder(self, index: int, value: Tensor) -> Proxy:
        node = self.graph.placeholder(f"input_{index}")
        node.meta["val"] = self._builder.tensor(value)
        return TensorProxy(node, self)

    def _result(self, value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            value = self.record("call_function", type(value), (), fields)
        return self.create_arg(value)

    def _inline(self, module: Any, path: str, args: Any, kwargs: Any) -> Any:
        self._visit(module, path)
        self._stack.append((path, module._dropfx_class))
        self._calls[path] += 1
        state, held = random_state(), contents(module)
        try:
            out = module.forward(*args, **kwargs)
            if contents(module) != held:
                self.refuse("its forward changes a container among its attributes")
            if random_state() != state:
                restore_random(state)
                self.refuse("its forward draws random numbers")
        except TraceRefused as refusal:
            refusal.path = path if refusal.path is None else refusal.path
            raise
        except Exception as error:
            raise TraceRefused(why(error), path) from error
        finally:
            self._stack.pop()
        return out

    def recurrent_forward(self, module: Any, args: Any, kwargs: Any) -> Any:
        """nn.LSTM.forward, or that of its kin, is called: by a call of the module, by a subclass, or by its name."""
        path = self._paths.get(id(module))
        if path is None:
            self.refuse("its forward calls a module that is not among its submodules")
        reason = recurrent.why_not(module, self._original(path))
        if reason is not None:
            self.refuse(f"its forward calls a recurrent one that is not recorded: {reason}")
        self._visit(module, path)
        return recurrent.record(self, module, path, args, kwargs)

    def call(self, module: Any, args: Any, kwargs: Any) -> Any:
        """A module is called: inline its forward, or record the call."""
        path = self._paths.get(id(module))
        if path is None:
            self.refuse("its forward calls a module that is not among its submodules")
        reason = self._stays_call(module, path)
        if reason is None:
            return self._inline(module, path, args, kwargs)
        if _substituted(module):
            self.refuse("its forward calls a module with other tensors in place of its parameters")
        self._visit(module, path)
        self._leaves[path] = reason
        self._calls[path] += 1
        return self.record("call_module", path, args, kwargs)

    def _stays_call(self, module: Any, path: str) -> str | None:
        original, cls = self._original(path), module._dropfx_class
        if path in self.opaque:
            return self.opaque[path]
        if cls is Opaque:
            return "it is a ScriptModule"
        if hooked(original):
            return "it has hooks" if "forward" not in original.__dict__ else "its instance has a forward of its own"
        if "_dropfx" in original.__dict__ and original.__dict__["_dropfx"].own:
            return "it was compiled on its own"
        if cls in INLINED_MODULES or (parametrize.is_parametrized(original) and cls.__mro__[1] in INLINED_MODULES):
            return None
        for base in INLINED_MODULES:
            if isinstance(module, base) and base not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
                return f"it is a subclass of {base.__name__}"
        if isinstance(module, recurrent.RECURRENT_MODULES):
            return recurrent.why_a_call(module, original)
        if cls.__module__.startswith("torch.nn."):
            return None if may_drop(module) and not isinstance(module, LEAF_MODULES) else ""
        return None

    def _original(self, path: str) -> nn.Module:
        return self.original.get_submodule(path)

    def _visit(self, module: Any, path: str) -> None:
        self._visited[path] = (module._dropfx_class, bool(path) and hooked(self._original(path)))

    def refuse(self, reason: str) -> NoReturn:
        """Raises TraceRefused: the module whose forward is running cannot be traced, for this reason."""
        raise TraceRefused(reason)

    # -- what the forward reads ----------------------------------------------------------------------------------

    def read(self, module: Recorder, name: str, value: Any) -> Any:
        """An attribute is read: tensors become live attributes of the graph, plain values are guarded."""
        path = self._paths.get(id(module))
        if path is None:
            return value
        if issubclass(type(value), Proxy):  # put there by torch.func.functional_call, for the time of a call
            return value
        if isinstance(value, Tensor):
            self._read.add((path, name))
            return self._attribute(value)
        if type(value) is float:
            return LiveFloat(value, path, name, self)
        if _plain(value):
            self.guard(path, name, copy.deepcopy(value))
        return value

    def guard(self, path: str, name: str, expected: Any, check: Callable[[Any], Any] | None = None) -> None:
        """The trace holds while `check` of the attribute (its value, without one) at `path` is `expected`."""
        key = (path, name, None if check is None else len(self._guards))
        self._guards.setdefault(key, Guard(path, name, expected, check))

    def write(self, module: Any, name: str, value: Any) -> None:
        """An attribute is written: only a weight that a recurrent module was left without, as WeightDrop does."""
        path = self._paths.get(id(module))
        if path is None or not (isinstance(value, TensorProxy) and recurrent.takes_weight(module, name)):
            self.refuse(f"its forward writes attribute {name!r}")
        if (path, name) in self._read:
            self.refuse(f"its forward reads attribute {name!r} before it writes it")
        module.__dict__[name] = value

    def _attribute(self, value: Tensor) -> Any:
        path = self._attributes.get(id(value))
        if path is None:
            self.refuse("its forward uses a tensor that is not an attribute of a module")
        if path not in self._get_attr:
            self._get_attr[path] = self._node("get_attr", path, (), {}, value)
        return TensorProxy(self._get_attr[path], self)

    # -- what the forward does -----------------------------------------------------------------------------------

    def function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A torch function on proxies."""
        if is_tensor_method_or_property(func) and not isinstance(func, type(len)):
            return self.method(func.__name__, args, kwargs)
        return self.record("call_function", func, args, kwargs)

    def method(self, name: str, args: Any, kwargs: Any) -> Any:
        """A tensor's method on proxies."""
        return self.record("call_method", name, args, kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """What fx's own Proxy calls for operators."""
        return self.record(kind, target, args, kwargs)

    def record(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Append a node and return its proxy (a structure of proxies where the value is a structure)."""
        if modes() != self._modes:
            self.refuse(which_mode(self._modes, modes()))
        site = self._site(kind, target, args, kwargs)
        if site is not None and site["live"] is not None:  # this use does not freeze the rate
            args, kwargs = pytree.tree_map(lambda a: float(a) if isinstance(a, LiveFloat) else a, (args, kwargs))
        fx_args, fx_kwargs = self.create_arg(tuple(args)), self.create_arg(dict(kwargs))
        value = evaluate(self, kind, target, fx_args, fx_kwargs)
        node = self._node(kind, target, fx_args, fx_kwargs, value)
        if site is not None:
            node.meta["site"] = site
        if op_name(node) in BERNOULLI:
            path = node.meta["path"]
            self._draws[path] += 1
            node.meta["bernoulli"] = f"{path}:bernoulli_{self._draws[path]}"
        return self._wrap(node, value)

    def record_recurrent(self, function: Any, args: Any, values: tuple[Tensor, ...], live: Any) -> Any:
        """A call of torch.lstm or its kin; `live`: where its rate is read."""
        made = self.record_known("call_function", function, args, values)
        node = made[0].node.args[0]
        path = node.meta["path"]
        self._recurrent[path] += 1
        node.meta["recurrent"] = {"path": path, "calls": self._recurrent[path], "live": live}
        return made

    def record_known(self, kind: str, target: Any, args: Any, value: Any, kwargs: Any = None) -> Any:
        """Append a node whose value is known."""
        if modes() != self._modes:
            self.refuse(which_mode(self._modes, modes()))
        node = self._node(kind, target, self.create_arg(tuple(args)), self.create_arg(dict(kwargs or {})), value)
        return self._wrap(node, value)

    def _node(self, kind: str, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        node = self.graph.create_node(kind, target, args, kwargs)
        node.meta["val"] = value
        node.meta["path"] = self._stack[-1][0] if self._stack else ""
        return node

    def _wrap(self, node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            return TensorProxy(node, self)
        if isinstance(value, (bool, int, float)) and node.op != "call_module":
            return ScalarProxy(node, self)
        if value is None:
            return None
        if isinstance(value, (tuple, list)):
            self.exact_shapes |= counted_by_size(node)
            parts = [
                self._wrap(self._node("call_function", operator.getitem, (node, i), {}, v), v)
                for i, v in enumerate(value)
            ]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if type(value) is dict:
            return {
                k: self._wrap(self._node("call_function", operator.getitem, (node, k), {}, v), v)
                for k, v in value.items()
            }
        node.meta["val"] = UNKNOWN
        return Proxy(node, self)

    def _site(self, kind: str, target: Any, args: Any, kwargs: Any) -> dict[str, Any] | None:
        """Name and live rate of a dropout."""
        if kind != "call_function" or target not in DROPOUT_FUNCTIONS:
            return None
        path, cls = self._stack[-1]
        if cls in DROPOUT_MODULES:
            name = path if self._calls[path] == 1 else f"{path}#{self._calls[path]}"
        else:
            self._functional[path] += 1
            name = f"{path}:dropout_{self._functional[path]}"
        rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        live = (rate.path, rate.name) if isinstance(rate, LiveFloat) else None
        return {"name": name, "rate": rate if isinstance(rate, Proxy) else float(rate), "live": live}

    def create_arg(self, a: Any) -> Any:
        """What fx calls for each argument of a node: proxies become nodes, live floats plain, tensors attributes.

        Raises:
            TraceRefused: the argument is a module, or of a kind that a graph cannot hold.
        """
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, LiveFloat):
            return a.bake()
        if isinstance(a, Tensor):
            return self._attribute(a).node
        if isinstance(a, nn.Module):
            self.refuse("its forward passes a module as an argument")
        try:
            return super().create_arg(a)
        except NotImplementedError:
            self.refuse(f"its forward passes a {type(a).__name__} to an operation")

    @contextmanager
    def _recording(self) -> Iterator[None]:
        self.tracing = True
        try:
            yield
        finally:
            self.tracing = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it nothing is recorded: code of torch's and ours runs on fakes."""
        before, self.tracing = self.tracing, False
        try:
            yield
        finally:
            self.tracing = before


def _substituted(module: nn.Module) -> bool:
    """Whether functional_call or WeightDrop has put values of the trace among its tensors: no call sees them."""
    owners = (owner for part in module.modules() for owner in (part._parameters, part._buffers, part.__dict__))
    return any(isinstance(value, Proxy) for owner in owners for value in owner.values())


def _plain(value: Any) -> bool:
    if type(value) is dict:
        value = list(value.values())
    if type(value) in (tuple, list, set):
        return all(type(v) is float or _plain(v) for v in value)
    return isinstance(value, _PLAIN)
