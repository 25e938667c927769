"""`torch.compile(model, backend="dropfx")`: the same passes on the graph that Dynamo captures.

Dynamo hands over functional calls whose parameters are placeholders. The passes run on a copy; the draws become further
inputs of what goes on to Inductor, so that no partitioner can redraw, merge or hoist them.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo.config
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import active_fake_mode

from dropfx.captured import Naming, Part, results_of, rewrite
from dropfx.errors import InvalidOption, PassError
from dropfx.graphs import copy_of
from dropfx.options import NAMES, make_options
from dropfx.pass_infra import Options
from dropfx.passes import AS_WRITTEN
from dropfx.runtime import OTHER_RANDOM, runtime

if os.environ.get("DROPFX_ALLOW_RNN") != "0":
    # by default Dynamo leaves nn.LSTM out of its graphs, and says nothing; loading the entry point is early enough
    torch._dynamo.config.allow_rnn = True

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
        options: those of `dropfx.compile`, and `inner`, what compiles the rewritten graph: "inductor" (default),
            "aot_eager" or "eager"; `inner_options`: Inductor's.
        mode: Inductor's, such as "reduce-overhead".

    Raises:
        InvalidOption (ValueError): an option is unknown or not accepted. Dynamo shows it inside of its own
            BackendCompilerFailed, as `inner_exception`.
    """
    checked, inner, inner_options = _checked({} if options is None else options)
    compile_inner = _inner(inner, inner_options, mode)
    naming = Naming(module)
    if not (naming.sites or naming.recurrent or naming.bernoulli or _drops_otherwise(module)):
        return compile_inner(module, example_inputs)
    results = len(results_of(module.graph))
    as_written = fx.GraphModule(module, copy_of(module.graph))
    try:
        if naming.bernoulli:  # masks made by hand, which `disabled` turns off only once they are known for that
            as_written, _ = rewrite(module, checked, naming, AS_WRITTEN)
        rewritten, parts = rewrite(module, checked, naming)
    except PassError as error:
        warnings.warn(f"dropfx: {error}; the graph is compiled as written", RuntimeWarning, stacklevel=2)
        rewritten, parts = module, []
    draws = [example for part in parts for example in part.examples]
    # no further compiler takes a recurrent function as written
    compiled = compile_inner(rewritten if parts or naming.recurrent else module, [*example_inputs, *draws])

    def run(*args: Any) -> Sequence[Any]:
        """One call of the graph: draws, then what the inner compiler made; as written where dropfx is disabled."""
        if runtime.disabled:
            with runtime.keeping_all():
                return tuple(as_written(*args))
        if not parts:
            return compiled(*args)
        if active_fake_mode() is not None:
            # DDP's graphs are cut at its buckets: Dynamo asks one part for the kinds of the next one's inputs
            return compiled(*args, *draws)[:results]
        with runtime.outermost():
            drawn = [part.draws.draw() for part in parts]
            places = zip(drawn, parts, strict=True)
            outputs = compiled(*args, *(getattr(d[index], field) for d, part in places for index, field in part.inputs))
            if runtime.frame is not None:
                _record(parts, drawn, [row.size(0) for row in outputs[results:]])
        return outputs[:results]

    return run


def _record(parts: list[Part], drawn: list[dict[int, Any]], rows: list[int]) -> None:
    for part, draws in zip(parts, drawn, strict=True):
        part.draws.record(draws, rows[: part.rows])
        rows = rows[part.rows :]


def _drops_otherwise(module: fx.GraphModule) -> bool:
    """Whether the graph has random functions that are no sites, but that `dropfx.disabled` turns off."""
    return any(node.target in OTHER_RANDOM for node in module.graph.nodes if node.op == "call_function")


# -- options --------------------------------------------------------------------------------------------------------


def _checked(options: Any) -> tuple[Options, Any, Any]:
    """The options of `dropfx.compile`, inner and inner_options."""
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise InvalidOption(f"options: got {options!r}, accepted is a dict by the names {', '.join(BACKEND_NAMES)}")
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
            raise InvalidOption(f"{name}: got {given!r}, which is Inductor's, but inner is {inner!r}: leave it out")
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
