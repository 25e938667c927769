"""`torch.compile(model, backend="dropfx")`: the same passes on the graph that Dynamo captures.

Dynamo hands over functional calls whose parameters are placeholders. The passes run on a copy; the draws become further
inputs of what goes on to Inductor, so that no partitioner can redraw, merge or hoist them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from dropfx.errors import InvalidOption
from dropfx.frontend.captured_graph import CapturedGraph
from dropfx.frontend.dynamo_settings import allow_recurrent
from dropfx.options import NAMES, Options, make_options

allow_recurrent()  # loading the entry point is early enough

INNER = ("inductor", "aot_eager", "eager")
BACKEND_NAMES = (*NAMES, "inner", "inner_options")
Compiled = Callable[..., Sequence[Any]]


def backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """What `torch.compile(model, backend="dropfx")` calls with each captured graph.

    Args:
        options: those of `dropfx.compile`; `inner`, what compiles the rewritten graph: "inductor" (default),
            "aot_eager" or "eager"; `inner_options`, a dict of Inductor's options.
        mode: a mode of Inductor, such as "reduce-overhead".

    Raises:
        InvalidOption (ValueError): an option is unknown or not accepted. Dynamo raises its own BackendCompilerFailed
            around it, with this error as `inner_exception`.
    """
    checked, inner, inner_options = _checked({} if options is None else options)
    compile_inner = _inner(inner, inner_options, mode)
    return CapturedGraph(module, example_inputs, checked, None if inner == "eager" else compile_inner)


# -- options --------------------------------------------------------------------------------------------------------


def _checked(options: Any) -> tuple[Options, Any, Any]:
    """The options of `dropfx.compile`, inner and inner_options."""
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise InvalidOption(f"options: got {options!r}, accepted is a dict with the keys {', '.join(BACKEND_NAMES)}")
    given = dict(options)
    inner, inner_options = given.pop("inner", "inductor"), given.pop("inner_options", None)
    return make_options(accepted=BACKEND_NAMES, **given), inner, inner_options


def _inner(inner: Any, inner_options: Any, mode: str | None) -> Callable[..., Compiled]:
    """What compiles the rewritten graph."""
    if inner not in INNER:
        raise InvalidOption(f"inner: got {inner!r}, accepted are {', '.join(map(repr, INNER))}")
    if inner_options is not None and not isinstance(inner_options, dict):
        raise InvalidOption(f"inner_options: got {inner_options!r}, accepted is a dict of Inductor's options")
    if inner == "inductor":
        return _inductor(inner_options, mode)
    for name, given in (("inner_options", inner_options), ("mode", mode)):
        if given:
            raise InvalidOption(f"{name}: got {given!r}, an option of Inductor, but inner is {inner!r}: leave it out")
    return lookup_backend(inner)


def _inductor(options: dict[str, Any] | None, mode: str | None) -> Callable[..., Compiled]:
    import torch._inductor  # slow, and not needed for the other two

    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise InvalidOption(f"mode: got {mode!r}, accepted are {', '.join(map(repr, modes))}")
    accepted = torch._inductor.list_options()
    for name in options or {}:
        if str(name).replace("-", "_") not in accepted:
            hint = "".join(f"; did you mean {close!r}?" for close in difflib.get_close_matches(str(name), accepted, 1))
            raise InvalidOption(
                f"inner_options: got {name!r}, accepted are the names of torch._inductor.list_options(){hint}"
            )
    try:
        made: Callable[..., Compiled] = torch._TorchCompileInductorWrapper(mode, options, None)
    except RuntimeError as error:  # a value of another type
        raise InvalidOption(f"inner_options: got {options!r}: {error}") from None
    return made
