"""The eager front end: dropfx.compile swaps a model's class in place, as FSDP2's fully_shard does."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dropfx.errors import DropfxError, InvalidInput, InvalidModel, NoDropoutWarning
from dropfx.frontend.compiled_module import NOTHING_DROPS, State
from dropfx.frontend.dtensor import tensor_parallel
from dropfx.frontend.swapped_class import original_class, swap, unswap
from dropfx.frontend.trial import generators_kept, training_copy
from dropfx.graph.dropout_ops import may_drop
from dropfx.options import make_options
from dropfx.patterns import Pattern

M = TypeVar("M", bound=nn.Module)


def compile(
    model: M,
    *,
    pattern: str | Pattern = "block",
    block: int | str = "auto",
    groups: int | str = "auto",
    lowering: str = "auto",
    min_speedup: float = 1.05,
    recipe: str | None = None,
    example_inputs: tuple[Any, ...] | list[Any] | Tensor = (),
    example_kwargs: dict[str, Any] | None = None,
    **unknown: Any,
) -> M:
    """Make training steps of `model` skip the work of what its dropouts drop. Changes it in place, and returns it.

    In training, the dropouts of the model draw structured patterns, and the Linears around them multiply kept units
    only. In eval mode the original forward runs. Parameters, buffers, state_dict keys and hooks stay the same; the
    class is replaced by a subclass of it, so that isinstance holds.

    Args:
        model: any `nn.Module`.
        pattern: "block", "slice", "row", "tile", or a pattern of `dropfx.patterns`. "tile" drops tiles of the weights
            of the Linears after a dropout, in place of units (structured DropConnect), and tiles of weights that the
            model itself drops.
        block: units per block, or "auto".
        groups: draws per batch. "auto": as many as keep what PyTorch's dropout does, by a rule of rows and rate
            (docs/patterns.md), chosen for each dropout when its graph is made. 1: all samples share one draw. G: the
            batch is cut along its first axis into G chunks, as torch.tensor_split does it, and each has its own draw.
            "time": each time step of a recurrent network has its own draw.
        lowering: "aten" copies kept blocks and multiplies by BLAS; "triton" gathers inside of its kernels, on a GPU or
            in Triton's interpreter; "auto" times both on a GPU, once per shape, and is "aten" elsewhere.
        min_speedup: a site whose predicted speed-up is lower runs as written; 0 rewrites every site that can be.
        recipe: "fast" for one draw a batch, "faithful" for up to four times those of "auto"; in place of `groups`.
        example_inputs: inputs of a training call, to capture the model now; without them its first training call does.
        example_kwargs: keyword inputs of that call.

    Raises:
        InvalidModel (TypeError): `model` is not a module that can be compiled, or it cannot be copied, which example
            inputs require (with FSDP2, compile before `fully_shard`, or leave the example inputs out).
        InvalidOption (ValueError): an option is unknown or not accepted.
        InvalidInput (ValueError): the example inputs do not fit the model.
    """
    if example_kwargs is not None and not isinstance(example_kwargs, dict):
        raise InvalidInput(f"example_kwargs: got {type(example_kwargs).__name__}, accepted is a dict of keyword inputs")
    options = make_options(pattern, block, groups, lowering, min_speedup, recipe, **unknown)
    check_model(model)
    if not may_drop(model):
        warnings.warn(NOTHING_DROPS, NoDropoutWarning, stacklevel=2)
        return model
    examples = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if examples or example_kwargs:
        check_inputs(model, examples, example_kwargs or {})
    state = State(options)
    if examples or example_kwargs:
        _capture_now(model, state, examples, example_kwargs or {})
    unswap(model)
    swap(model, state)
    if has_forward(model):
        state.watch(model)
    else:  # a LightningModule, say: its steps call its parts
        state.adopt_parts(model)
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


def check_model(model: Any) -> None:
    """Raise InvalidModel where `model` is not a module that can be compiled."""
    if not isinstance(model, nn.Module):
        raise InvalidModel(f"model: got {type(model).__name__}, accepted is a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidModel(
            "model: got a ScriptModule, whose forward cannot be captured; give the nn.Module that it was made from"
        )
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise InvalidModel(
            "model: got a model that torch.compile wraps; give the plain model, here or to "
            "torch.compile(model, backend='dropfx')"
        )
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers):
        name = type(model).__name__
        raise InvalidModel(f"model: got a {name} wrapper; give the module inside: dropfx.compile(model.module)")
    if "forward" in model.__dict__:
        raise InvalidModel(
            "model: `forward` is set on the instance, which would hide the compiled one; define it in the class"
        )


def check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise InvalidInput where the inputs do not fit the signature of model's forward."""
    try:
        inspect.signature(original_class(model).forward).bind(model, *args, **kwargs)  # type: ignore[attr-defined]
    except TypeError as error:
        raise InvalidInput(f"inputs: they do not fit {type(model).__name__}.forward: {error}") from None


def has_forward(model: nn.Module) -> bool:
    """Whether the class of the model has a forward of its own."""
    return original_class(model).forward is not nn.Module.forward  # type: ignore[attr-defined]


def _capture_now(model: nn.Module, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Capture with example inputs, as in training; the model, its flags and the generators stay as they are."""
    if tensor_parallel(model, (args, kwargs)):
        return
    trial = training_copy(model)
    swap(trial, state)
    try:
        with torch.inference_mode(False), torch.enable_grad(), generators_kept():
            trial(*args, **kwargs)
    except DropfxError:
        raise
    except Exception as error:
        raise InvalidInput(f"example_inputs: {type(model).__name__}.forward fails on them: {error}") from error
    state.serve(model)
