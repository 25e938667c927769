"""Registration of a gathered op: one reference, two faces.

`dropfx::name` is a `torch.library` op for graph compilers. Dispatching it with autograd costs 80-90 microseconds on a
CPU; the eager front end therefore calls the same functions through a `torch.autograd.Function`, at a third of that.
References, fakes, formulas and Functions take what is kept of an axis as one `Kept`; `flat` makes the op's schema.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dropfx.errors import DoubleBackwardError
from dropfx.ops.flat import Layout

EAGER: dict[Any, Callable[..., Any]] = {}
"""Registered op -> what eager code calls in its place."""


_layouts: dict[Any, Layout] = {}


def eager(op: Any, function: type[torch.autograd.Function]) -> None:
    """Let eager graphs call `function` where compilers call `op`."""

    def call(*args: Any) -> Any:
        """The op's result, by the autograd.Function."""
        return function.apply(*grouped(op, args))

    call.__name__ = call.__qualname__ = f"eager_{op.name().partition('::')[2]}"
    call.__module__ = function.__module__
    EAGER[op] = call


def define(name: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `reference`, whose annotations give the schema, as `dropfx::name`; returns the overload."""
    layout = Layout(reference)
    torch.library.custom_op(f"dropfx::{name}", layout.flattened(reference), mutates_args=())
    torch.library.register_fake(f"dropfx::{name}", layout.flattened(fake))
    op = getattr(torch.ops.dropfx, name).default
    _layouts[op] = layout
    return op


def differentiable(op: Any, save: Callable[..., None], formula: Callable[..., Sequence[Any]]) -> None:
    """Give an op its derivative: save(ctx, the reference's arguments, output), formula(ctx, *grads).

    The formula returns gradients of the first arguments; those after them have none.
    """
    layout = _layouts[op]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what the formula reads."""
        save(ctx, layout.grouped(inputs), output)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """A gradient, or None, of every argument of the op."""
        return layout.padded(formula(ctx, *grads))

    torch.library.register_autograd(op, backward, setup_context=setup)


def flat(op: Any, *args: Any) -> tuple[Any, ...]:
    """The op's arguments of its reference's."""
    return _layouts[op].flat(args)


def by(op: Any) -> Callable[..., Any]:
    """The op as a function of its reference's arguments."""
    return lambda *args: op(*flat(op, *args))


def grouped(op: Any, args: Sequence[Any]) -> list[Any]:
    """The arguments of an op's reference of the op's own."""
    return _layouts[op].grouped(args)


def padded(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    """What the backward of an autograd.Function returns: gradients of its first inputs, and None for the others."""
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


INSTEAD = "dropfx.compile(model) has one, outside of torch.compile"


def first_derivative_only(op: Any, instead: str = INSTEAD) -> None:
    """Let the second derivative through `op` fail by name and not by a missing formula."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Raises DoubleBackwardError."""
        raise DoubleBackwardError(f"{op} has no second derivative; {instead}")

    torch.library.register_autograd(op, backward, setup_context=lambda ctx, inputs, output: None)


def fresh(out: Tensor, source: Tensor) -> Tensor:
    """A registered op may not return a view of its input, and its strides are those of its fake."""
    shared = torch._C._is_alias_of(out, source)  # type: ignore[attr-defined]
    return out.clone(memory_format=torch.contiguous_format) if shared else whole(out)


def whole(out: Tensor) -> Tensor:
    """A new result without the view of a temporary that it is, as PyTorch's own operations return theirs.

    Autograd refuses to change a view in place that was made inside of a Function, and FSDP2 warns of it.
    """
    made: Tensor = torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out
    return made


_library = torch.library.Library("dropfx", "FRAGMENT")  # kept: dropping it would unregister the kernels
_OPERANDS = (0, 1, 2)  # input, weight, bias or None


def autocast(name: str) -> None:
    """Let autocast cast the input, weight and bias of `dropfx::name`, its first three arguments."""
    op = getattr(torch.ops.dropfx, name).default

    # torch.library.register_autocast fixes the dtype at registration; a user's autocast may name another
    def kernel_for(device: str) -> Callable[..., Any]:
        """What the dispatcher calls for the op under autocast of a device type ("cpu", "cuda")."""
        key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

        def kernel(*args: Any) -> Any:
            """The op below autocast, with its operands in autocast's dtype of the moment."""
            dtype = torch.get_autocast_dtype(device)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*(_cast(a, dtype) if i in _OPERANDS else a for i, a in enumerate(args)))

        return kernel

    for device in ("cpu", "cuda"):
        _library.impl(name, kernel_for(device), f"Autocast{device.upper()}")


def _cast(operand: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What PyTorch's own autocast makes of an operand: float64 stays."""
    return operand if operand is None or operand.dtype is torch.float64 else operand.to(dtype)
