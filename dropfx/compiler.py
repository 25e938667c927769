"""The eager front end: dropfx.compile swaps a model's class in place, as FSDP2's fully_shard does."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dropfx.compiled import NOTHING_DROPS, State, original_class, swap, unswap
from dropfx.errors import DropfxError, InvalidInput, InvalidModel, NoDropoutWarning
from dropfx.options import make_options
from dropfx.packed import opened
from dropfx.patterns import Pattern
from dropfx.runtime import runtime
from dropfx.sharding import tensor_parallel
from dropfx.sites import may_drop
from dropfx.specialise import key_of
from dropfx.tracing import TraceRefused

M = TypeVar("M", bound=nn.Module)


def compile(
    model: M,
    *,
    pattern: str | Pattern = "block",
    block: int | str = "auto",
    groups: int | str = 1,
    lowering: str = "auto",
    min_speedup: float = 1.05,
    example_inputs: tuple[Any, ...] | list[Any] | Tensor = (),
    example_kwargs: dict[str, Any] | None = None,
    **unknown: Any,
) -> M:
    """Stop `model` from paying for what its dropouts drop; in place, and returned.

    In training, the dropouts of the model draw structured patterns, and the Linears around them multiply kept units
    only. In eval the model runs as it was. Parameters, buffers, state_dict keys, hooks and isinstance are the same.

    Args:
        model: any `nn.Module`.
        pattern: "block", "slice", "row", "tile", or a pattern of `dropfx.patterns`. "tile" drops tiles of the weights
            behind a dropout (structured DropConnect) in place of units, and of weights that the model itself drops.
        block: units in a block, or "auto".
        groups: draws a batch, one for each of so many contiguous chunks of the leading axis; 1 shares one draw.
        lowering: "aten" copies kept blocks and multiplies by BLAS; "triton" gathers inside of its kernels, on a GPU or
            in Triton's interpreter; "auto" takes what is known to be faster, today "aten".
        min_speedup: predicted speed-up from which a site is rewritten; 0 rewrites all that can be.
        example_inputs: inputs of a training call, to trace at once; else the first training call traces.
        example_kwargs: keyword inputs of that call.

    Raises:
        InvalidModel (TypeError): `model` is not a module that can be compiled, or cannot be copied to try the example
            inputs (FSDP2: compile first, or leave them out).
        InvalidOption (ValueError): an option is unknown or not accepted.
        InvalidInput (ValueError): the example inputs do not fit the model.
    """
    if example_kwargs is not None and not isinstance(example_kwargs, dict):
        raise InvalidInput(f"example_kwargs: got {type(example_kwargs).__name__}, accepted is a dict of keyword inputs")
    options = make_options(pattern, block, groups, lowering, min_speedup, **unknown)
    check_model(model)
    if not may_drop(model):
        warnings.warn(NOTHING_DROPS, NoDropoutWarning, stacklevel=2)
        return model
    examples = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if examples or example_kwargs:
        check_inputs(model, examples, example_kwargs or {})
    unswap(model)
    swap(model, State(options))
    if examples or example_kwargs:
        _specialise_now(model, examples, example_kwargs or {})
    return model


def restore(model: M) -> M:
    """Undo `dropfx.compile(model)` in place; returns the model. A model that is not compiled stays as it is.

    Raises:
        InvalidModel (TypeError): `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise InvalidModel(f"model: got {type(model).__name__}, accepted is a torch.nn.Module")
    unswap(model)
    return model


def trace_count() -> int:
    """Traces made by this process so far."""
    return runtime.traces


def check_model(model: Any) -> None:
    """Raise InvalidModel where `model` is not a module that can be compiled."""
    if not isinstance(model, nn.Module):
        raise InvalidModel(f"model: got {type(model).__name__}, accepted is a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidModel(
            "model: got a ScriptModule, whose forward cannot be traced; compile the module before scripting"
        )
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise InvalidModel("model: got the wrapper of torch.compile; use torch.compile(dropfx.compile(model))")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers):
        name = type(model).__name__
        raise InvalidModel(f"model: got a {name} wrapper; compile what it wraps, dropfx.compile(model.module)")
    if "forward" in model.__dict__:
        raise InvalidModel("model: its instance has a `forward` of its own, which would hide the compiled one")


def check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise InvalidInput where the inputs do not fit the signature of model's forward."""
    try:
        inspect.signature(original_class(model).forward).bind(model, *args, **kwargs)  # type: ignore[attr-defined]
    except TypeError as error:
        raise InvalidInput(f"example_inputs: they do not fit {type(model).__name__}.forward: {error}") from None


def _specialise_now(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Trace with example inputs, as in training; the model's flags stay as they are."""
    if tensor_parallel(model, (args, kwargs)):
        return
    flags = {module: module.training for module in model.modules()}
    state: State = model.__dict__["_dropfx"]
    model.train()
    try:
        plain = not kwargs and all(type(a) is Tensor for a in args)
        leaves, spec = (list(args), len(args)) if plain else pytree.tree_flatten(opened((args, kwargs)))
        key = key_of(leaves)
        if key is None:
            raise InvalidInput("example_inputs: accepted are tensors, plain Python values and containers of these")
        error = _fails_as_written(model, args, kwargs)
        if error is not None:
            raise InvalidInput(f"example_inputs: {type(model).__name__}.forward fails on them: {error}") from error
        with contextlib.suppress(TraceRefused):  # its parts are traced in the first training call
            state.specialise(model, args, kwargs, (spec, *key))
    except DropfxError:
        unswap(model)
        raise
    finally:
        for module, training in flags.items():
            module.training = training


def _fails_as_written(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """The error that the original forward raises on these inputs, tried without a trace left on model or generator."""
    try:
        trial = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    except Exception as error:
        raise InvalidModel(f"model: it cannot be copied to try the example inputs: {error}") from error
    unswap(trial)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            trial(*args, **kwargs)
    except Exception as error:
        return error
    return None
