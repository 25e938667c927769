"""State of the process that every compiled call looks at: recording, disabling, where draw numbers come from."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dropfx.graph.dropout_ops import DROPOUT_FUNCTIONS, RECURRENT_FUNCTIONS, Call, recurrent_names

Masks = dict[str, Tensor]


class Frame:
    """What one compiled forward records, graph by graph.

    Attributes:
        masks: site name -> multiplier.
        calls: calls that earlier graphs of this forward have made.
    """

    def __init__(self) -> None:
        self.masks: Masks = {}
        self.calls: Counter[str] = Counter()

    def note(self, call: Call, mask: Tensor, suffix: str = "") -> None:
        """Record one site's multiplier; the suffix tells the multipliers of one call apart."""
        self.masks[call.behind(self.calls).name + suffix] = mask


class _Runtime(threading.local):
    """The one instance is `runtime`: what is a thread's own, beside what `shared` by all."""

    frame: Frame | None = None
    keeping = 0

    @contextmanager
    def keeping_all(self) -> Iterator[None]:
        """Inside of a compiled forward under `disabled`."""
        self.keeping += 1
        try:
            yield
        finally:
            self.keeping -= 1

    @contextmanager
    def outermost(self) -> Iterator[None]:
        """One dict a compiled forward: compiled modules inside a compiled module write into its dict."""
        if not shared.records or self.frame is not None:
            yield
            return
        self.frame = Frame()
        try:
            yield
        finally:
            masks, self.frame = self.frame.masks, None
            for record in shared.records:
                record.append(masks)


class _Shared:
    """What all threads see.

    Attributes:
        rewritten: graphs that were rewritten so far.
    """

    def __init__(self) -> None:
        self.records: list[list[Masks]] = []
        self.disabled = 0
        self.own_numbers = 0
        self.rewritten = 0


shared = _Shared()
runtime = _Runtime()


@contextmanager
def recording() -> Iterator[list[Masks]]:
    """Collect the multipliers of every compiled forward inside the context."""
    masks: list[Masks] = []
    shared.records.append(masks)
    try:
        yield masks
    finally:
        shared.records.remove(masks)


@contextmanager
def numbers_of_their_own() -> Iterator[None]:
    """Leave PyTorch's generator as it was after each draw, so that other random operations repeat without dropfx."""
    shared.own_numbers += 1
    try:
        yield
    finally:
        shared.own_numbers -= 1


@contextmanager
def disabled() -> Iterator[None]:
    """Context manager: every dropout of compiled models keeps all units.

    For debugging: the loss without dropout, with `model.training` and everything else as it is.
    """
    shared.disabled += 1
    try:
        with _KeepAll():
            yield
    finally:
        shared.disabled -= 1


def backward_under(
    mode: TorchFunctionMode,
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Tensor.backward with `mode` in force, which PyTorch lifts while the mode handles the call.

    Activation checkpointing runs forwards during backward; they must see what the first forward saw.
    """
    wanted = () if inputs is None else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    seed = torch.ones_like(tensor) if gradient is None else gradient
    retain = create_graph if retain_graph is None else retain_graph
    with mode:
        torch.autograd.Variable._execution_engine.run_backward(
            (tensor,), (seed,), retain, create_graph, wanted, allow_unreachable=True, accumulate_grad=True
        )


class _KeepAll(TorchFunctionMode):
    """Turns every dropout of compiled models into the identity, those in recurrent and attention functions too.

    Also during backward, where activation checkpointing runs forwards again.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.compiler.is_dynamo_compiling():  # what is captured here runs as written when it is called
            return func(*args, **kwargs)
        if func is Tensor.backward:
            return backward_under(self, *args, **kwargs)
        if not runtime.keeping and torch._C._current_graph_task_id() == -1:
            return func(*args, **kwargs)
        if func in DROPOUT_FUNCTIONS or func in _IDENTITY:
            return args[0] if args else kwargs["input"]
        if func in RECURRENT_FUNCTIONS:
            place = recurrent_names(args).index("dropout")
            args = (*args[:place], 0.0, *args[place + 1 :])
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
        if func is F.multi_head_attention_forward:
            kwargs["dropout_p"] = 0.0
            args = (*args[:10], 0.0, *args[11:]) if len(args) > 10 else args
            kwargs = {k: v for k, v in kwargs.items() if len(args) <= 10 or k != "dropout_p"}
        return func(*args, **kwargs)


_IDENTITY = (F.alpha_dropout, F.feature_alpha_dropout, torch.alpha_dropout, torch.feature_dropout)
