"""A module's forward, captured by Dynamo graph by graph; its guards decide when a graph holds.

Code that ends a graph, or that Dynamo cannot follow at all, runs as written. It is tried again later, at growing
intervals, since an attempt takes long. Limits are our own, not those of the user's `torch.compile`.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch._dynamo import eval_frame, optimize
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.types import ConvertFrameReturn

from dropfx.frontend.captured_graph import CapturedGraph
from dropfx.frontend.checkpoints import without_gradients
from dropfx.frontend.dtensor import TENSOR_PARALLEL, tensor_parallel
from dropfx.frontend.dynamo_graph import results_of
from dropfx.frontend.dynamo_settings import capturing
from dropfx.frontend.packed_sequence import packed_layers, run_packed, takes_packed
from dropfx.frontend.whole_calls import whole_calls
from dropfx.options import Options

RECOMPILE_LIMIT = 32
"""How often one function of a module is captured; a call that fits none of these graphs then runs as written."""

_FIRST_RETRY, _RETRY_FACTOR = 4, 8
"""Calls until a forward that was not captured as a whole is tried again, and the factor by which that number grows."""

_numbers = itertools.count(1)
_ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(eval_frame._optimize).parameters else {}
)


class CaptureError(Exception):
    """A graph cannot be used; the next call captures another."""


HandOn = Callable[[nn.Module, str], None]


class Capture:
    """The graphs of one model.

    Args:
        module: its root; held weakly.
        prefix: path of the root in the model, "" or ending in a dot.
        hand_on: called with a part and its path where the part's forward, or some of it, could not be captured.

    Attributes:
        graphs: captured so far, in their order.
        left: path of a module whose forward, or a part of it, runs as written -> why.
    """

    def __init__(self, module: nn.Module, options: Options, prefix: str, hand_on: HandOn) -> None:
        self.graphs: list[CapturedGraph] = []
        self.left: dict[str, str] = {}
        self.limited, self.hand_on, self._whole = "", hand_on, True
        self._root, self._options, self._prefix = weakref.ref(module), options, prefix
        self._name = f"{type(module).__name__}_{next(_numbers)}"
        self._paths: dict[int, str] = {}
        self._calls, self._retry = 0, _FIRST_RETRY
        self._run, self._frames = self._optimized()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """forward(*args, **kwargs) of the module's original class."""
        if self.left:
            self._calls += 1
            if self._calls > self._retry:
                self._retry *= _RETRY_FACTOR
                self._start_anew()
        asked = self._frames.asked
        with whole_calls if self._whole else contextlib.nullcontext():
            try:
                if takes_packed(module, args):
                    return run_packed(module, lambda *given: self._run(module, given, {}, True), *args, **kwargs)
                return self._run(module, args, kwargs, False)
            except BaseException:
                if self._frames.asked != asked:  # what was captured of these inputs must not serve others
                    self._start_anew()
                raise

    def _start_anew(self) -> None:
        """Forget all graphs: what ended one may have gone."""
        self._calls = 0
        self.graphs.clear()
        self.left.clear()
        self._run, self._frames = self._optimized()

    def serve(self, module: nn.Module) -> None:
        """Take `module` for the root: one built like the present one."""
        self._root, self._paths = weakref.ref(module), {}

    def _optimized(self) -> tuple[Callable[..., Any], _Frames]:
        def forward(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any], packed: bool) -> Any:
            """What Dynamo captures: whatever the class' forward is by then."""
            if packed:
                return packed_layers(self, *args)
            return self._dropfx_original.forward(self, *args, **kwargs)

        # Dynamo keeps what it captured with the code, and what it saw change by its name: each model has its own
        forward.__code__ = forward.__code__.replace(co_name=self._name)
        this = weakref.ref(self)  # Dynamo keeps backends for good

        def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            """What Dynamo calls with each graph."""
            capture = this()
            assert capture is not None
            return capture._captured(module, example_inputs)

        context: Any = optimize(backend, **_ISOLATED)
        frames = _Frames(getattr(context, "callback", None), this)  # TORCHDYNAMO_DISABLE leaves nothing to ask
        context.callback = frames
        return context(forward), frames

    def _captured(self, module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        root, frame = self._root(), InstructionTranslator.current_tx().output.root_tx
        self._paths = {}  # modules may have been replaced, and their ids given to others
        owner = _self_of(frame.f_code, frame.f_locals)
        path = self.path_of(owner) or ""
        if owner is not None and owner is not root and frame.f_code.co_name != self._name:
            # else blocks that are alike would share a graph, and its sites the names of the first block's
            name = next(name for name, value in frame.f_locals.items() if value is owner)
            install_guard(LocalSource(name, is_input=True).make_guard(GuardBuilder.ID_MATCH))
        if self.tensor_parallel:
            self.left[""] = TENSOR_PARALLEL
            return module.forward
        if None in results_of(module.graph):
            # PyTorch 2.13 loses a number that the forward changes, where a function mode is active
            self._whole = False
            raise CaptureError("PyTorch loses a number that the forward changes")
        if without_gradients(module):
            raise CaptureError("no input of a reentrant checkpoint in it requires a gradient")
        made = CapturedGraph(module, example_inputs, self._options, None, self._paths, path)
        if made.failed:
            self.left[path] = made.failed
        self.graphs.append(made)
        return made

    @property
    def tensor_parallel(self) -> bool:
        """Whether the model is one that runs as written with all its parts."""
        root = self._root()
        return root is not None and tensor_parallel(root)

    def path_of(self, module: Any) -> str | None:
        """Path in the model, None for what is no part of it."""
        root = self._root()
        if id(module) not in self._paths and root is not None:
            self._paths = {id(m): f"{self._prefix}{name}" for name, m in root.named_modules()}
            self._paths[id(root)] = self._prefix.rstrip(".")
        return self._paths.get(id(module))


class _Frames:
    """What Dynamo asks for each function that runs within a capture and fits no graph yet.

    Attributes:
        failed: functions that cannot be captured.
        asked: how often Dynamo was asked to capture one.
    """

    def __init__(self, convert: Any, capture: weakref.ref[Capture]) -> None:
        self._torchdynamo_orig_backend = convert  # by this name Dynamo tells backends apart
        self._capture = capture
        self._captured: Counter[tuple[types.CodeType, int]] = Counter()
        self.failed: set[types.CodeType] = set()
        self.asked = 0

    def __call__(self, frame: Any, entry: Any, state: Any) -> ConvertFrameReturn:
        code, capture = frame.f_code, self._capture()
        as_written = ConvertFrameReturn(apply_to_code=False)
        if capture is None or code in self.failed:
            return as_written
        of_one = code, id(_self_of(code, frame.f_locals))
        if self._captured[of_one] >= RECOMPILE_LIMIT:
            self._warn(capture, frame, entry)
            return as_written
        self.asked += 1
        try:
            made, reasons = self._convert(frame, entry, state)
        except Exception as error:  # one of the model's own is raised again as it runs as written
            self._fail(capture, frame, one_line(str(getattr(error, "inner_exception", error))))
            return as_written
        self._captured[of_one] += made.guarded_code is not None
        for reason in reasons:
            self._left(capture, frame, reason)
        if (made.skip_reason or "").startswith(_EMPTY):
            self.failed.add(code)
            return as_written
        if (made.skip_reason or "").startswith(_FAILED):
            self._fail(capture, frame, "Dynamo cannot capture it")
            return as_written
        return made

    def _convert(self, frame: Any, entry: Any, state: Any) -> tuple[ConvertFrameReturn, list[str]]:
        """What Dynamo makes of a function, and why its graphs end."""
        with capturing() as reasons:
            made: ConvertFrameReturn = self._torchdynamo_orig_backend(frame, entry, state)
        return made, [one_line(reason) for reason in reasons]

    def _fail(self, capture: Capture, frame: Any, reason: str) -> None:
        self.failed.add(frame.f_code)
        self._left(capture, frame, reason)

    def _left(self, capture: Capture, frame: Any, reason: str) -> None:
        """A function runs as written, or a part of it."""
        module = _self_of(frame.f_code, frame.f_locals)
        path = capture.path_of(module)
        capture.left.setdefault(path or "", reason)
        if path is not None and not capture.tensor_parallel:
            capture.hand_on(module, path)

    def _warn(self, capture: Capture, frame: Any, entry: Any) -> None:
        if capture.limited:
            return
        path = capture.path_of(_self_of(frame.f_code, frame.f_locals))
        capture.limited = f"captured {RECOMPILE_LIMIT} times, because what it reads keeps changing"
        capture.left[path or ""] = capture.limited
        name = f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_code.co_firstlineno})"
        cause = _cause(frame, entry, innermost_backend(self._torchdynamo_orig_backend))
        warnings.warn(
            f"dropfx.compile: {name} was {capture.limited}{cause}. From now on a call that fits none of these graphs "
            "runs as written. Make the value that changes a tensor, or raise "
            "dropfx.frontend.capture.RECOMPILE_LIMIT",
            RuntimeWarning,
            stacklevel=3,
        )


_EMPTY = "Dynamo decided to skip"
_FAILED = ("an error was suppressed", "compilation failed")


def _cause(frame: Any, entry: Any, backend: Any) -> str:
    """Which guard did not hold."""
    try:
        from torch._dynamo.guards import get_and_maybe_log_recompilation_reasons

        reasons: Any = get_and_maybe_log_recompilation_reasons([entry], frame, backend, skip_logging=True)
    except Exception:
        return ""
    return f" ({reasons[0].strip()})" if reasons else ""


def _self_of(code: types.CodeType, values: dict[str, Any]) -> Any:
    """The module whose method a function is."""
    names = [*code.co_varnames[:1], "self", *values]  # where it goes on behind a break its first argument is another
    return next((values[name] for name in names if isinstance(values.get(name), nn.Module)), None)


def one_line(text: str) -> str:
    """The first line of a message of Dynamo's, with its explanation."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    explained = next((line.partition(":")[2].strip() for line in lines if line.startswith("Explanation:")), "")
    return re.sub(r"\s+", " ", f"{lines[0]}: {explained}" if explained else lines[0]) if lines else ""
