"""Proxies that know their value's kind, so that `isinstance`, `.dim()` and `.shape` answer as they would eagerly.

Facts that the specialisation key holds (rank, dtype, device) are answered at once; sizes stay symbolic; anything that
depends on data refuses the module whose forward asks.
"""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from torch import fx

if TYPE_CHECKING:
    from dropfx.tracing.tracer import Tracer

KEYED_ATTRIBUTES = frozenset({"dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse", "is_meta"})
KEYED_ATTRIBUTES |= {"is_quantized", "is_nested", "is_mps", "is_xpu", "itemsize"}
KEYED_METHODS = frozenset({"dim", "ndimension", "is_floating_point", "is_complex", "get_device", "element_size"})
_INPLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul")


class Shape(tuple[Any, ...]):
    """A tensor's sizes as a tuple of scalar proxies."""

    def numel(self) -> Any:
        """Product of the sizes, a scalar proxy where one of them is."""
        total: Any = 1
        for size in self:
            total = total * size
        return total


class Proxy(fx.Proxy):
    """Base: a recorded value; `value` is its fake."""

    tracer: Tracer

    @property
    def value(self) -> Any:
        """The fake: a FakeTensor, a symbolic number, or a structure of them."""
        return self.node.meta["val"]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found: list[Proxy] = []
        fx.node.map_aggregate((args, kwargs or {}), lambda a: found.append(a) if isinstance(a, Proxy) else None)
        return found[0].tracer.function(func, args, kwargs or {})

    def _refuse(self, what: str) -> NoReturn:
        self.tracer.refuse(f"its forward {what}")

    def __bool__(self) -> bool:
        self._refuse("branches on data")

    def __len__(self) -> int:
        self._refuse("asks the length of a value that depends on data")

    def __iter__(self) -> Iterator[Any]:
        self._refuse("iterates over a value of unknown length")

    def __index__(self) -> int:
        self._refuse("turns data into a Python number")

    __int__ = __index__

    def __float__(self) -> float:
        self._refuse("turns data into a Python number")

    def __contains__(self, item: Any) -> bool:
        self._refuse("searches in data")

    def __setitem__(self, key: Any, value: Any) -> None:
        self._refuse("assigns to items of a tensor")

    __hash__ = fx.Proxy.__hash__


class TensorProxy(Proxy):
    """A tensor."""

    def __getattr__(self, name: str) -> Any:
        if name == "shape":
            return self.size()
        value = self.value
        if name in KEYED_ATTRIBUTES:
            return getattr(value, name)
        if name == "data":
            return self.detach()
        if name == "_is_param":  # isinstance(x, nn.Parameter) asks for it
            return getattr(value, name, False)
        if name in ("requires_grad", "grad", "grad_fn", "is_leaf"):
            self._refuse(f"reads a tensor's .{name}")
        with self.tracer.paused():
            found = getattr(value, name)
        if name in KEYED_METHODS:
            return found
        if callable(found):
            return lambda *args, **kwargs: self.tracer.method(name, (self, *args), kwargs)
        return self.tracer.record("call_function", getattr, (self, name), {})

    def size(self, dim: int | None = None) -> Any:
        """A size as a scalar proxy; all of them as a `Shape` where no `dim` is named."""
        if dim is None:
            return Shape(self.size(d) for d in range(self.value.dim()))
        return self.tracer.record("call_method", "size", (self, dim), {})

    def __len__(self) -> int:
        return int(self.size(0))

    def __iter__(self) -> Iterator[Any]:
        return (operator.getitem(self, i) for i in range(int(self.size(0))))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.record("call_function", operator.setitem, (self, key, value), {})


class ScalarProxy(Proxy):
    """A number computed from sizes. Asked for its value, it gives it, and the sizes become part of the key."""

    def _concrete(self) -> Any:
        self.tracer.exact_shapes = True
        return self.value

    def __bool__(self) -> bool:
        return bool(self._concrete())

    def __index__(self) -> int:
        return int(self._concrete())

    __int__ = __index__

    def __float__(self) -> float:
        return float(self._concrete())

    def __hash__(self) -> int:
        return hash(self._concrete())

    def __format__(self, spec: str) -> str:
        return format(self._concrete(), spec)


_OWN = ("dropfx", "torch")  # whose code asks what a proxy is, not what it stands for


def _asked_by_us() -> bool:
    """Whether the call of `isinstance` comes from us or PyTorch, directly or through Python's own library."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in sys.stdlib_module_names or package == "__main__":
            return package in _OWN
        frame = frame.f_back
    return False


@contextmanager
def python_isinstance() -> Iterator[None]:
    """Let Python code, and it alone, find that a proxy is an instance of its value's class.

    A `__class__` property would tell C code the same, which would then read a proxy's memory as a tensor's.
    """
    original = builtins.isinstance

    def isinstance(obj: Any, classes: Any) -> bool:
        """As the builtin, where a proxy of a tensor or number is an instance of its fake's classes too."""
        if original(obj, classes):
            return True
        if type(obj) is Proxy and not _asked_by_us():
            obj._refuse("asks the type of a value that only running it would tell")
        return type(obj) in (TensorProxy, ScalarProxy) and original(obj.value, classes)

    builtins.isinstance = isinstance
    try:
        yield
    finally:
        builtins.isinstance = original


def _inplace(name: str) -> Callable[[Proxy, Any], Any]:
    # fx proxies lack these, so that Python would fall back to the functional operator and lose the aliasing
    target = getattr(operator, name)

    def method(self: Proxy, other: Any) -> Any:
        """Records the in-place operator."""
        return self.tracer.record("call_function", target, (self, other), {})

    return method


for _name in _INPLACE:
    setattr(TensorProxy, f"__{_name}__", _inplace(_name))


class LiveFloat(float):
    """A float attribute while tracing: as a dropout's rate it stays live, in any other use its value is guarded."""

    path: str
    name: str
    tracer: Tracer

    def __new__(cls, value: float, path: str, name: str, tracer: Tracer) -> LiveFloat:
        """The value of the attribute `name` of the module at `path`."""
        self = super().__new__(cls, value)
        self.path, self.name, self.tracer = path, name, tracer
        return self

    def bake(self) -> float:
        """The plain value, which the graph is then specialised to."""
        self.tracer.guard(self.path, self.name, float(self))
        return float(self)

    def __bool__(self) -> bool:
        self.tracer.guard(self.path, self.name, float(self) != 0, bool)
        return float(self) != 0

    def __hash__(self) -> int:
        return hash(self.bake())


def _comparison(name: str) -> Callable[[LiveFloat, Any], Any]:
    function = getattr(operator, name)

    def method(self: LiveFloat, other: Any) -> Any:
        """The comparison's result, which is what is guarded, not the value."""
        if isinstance(other, (int, float)) and not isinstance(other, (Proxy, LiveFloat)):
            result = function(float(self), other)
            self.tracer.guard(self.path, self.name, result, lambda value: function(value, other))
            return result
        return function(self.bake(), other)

    return method


def _arithmetic(name: str) -> Callable[..., Any]:
    def method(self: LiveFloat, *others: Any) -> Any:
        """The operator's result on the plain value, which is guarded."""
        others = tuple(o.bake() if isinstance(o, LiveFloat) else o for o in others)
        value = self.bake()
        result = getattr(value, name)(*others)
        if result is NotImplemented:
            return NotImplemented
        return result

    return method


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(LiveFloat, f"__{_name}__", _comparison(_name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(LiveFloat, f"__{_name}__", _arithmetic(f"__{_name}__"))
    setattr(LiveFloat, f"__r{_name}__", _arithmetic(f"__r{_name}__"))
for _name in ("neg", "pos", "abs", "int", "float", "round", "trunc"):
    if _name != "float":
        setattr(LiveFloat, f"__{_name}__", _arithmetic(f"__{_name}__"))
