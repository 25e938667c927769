"""Which lowering a gathered op gets, and why: as asked for, as measured on the device, or by its cost table."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dropfx import ops
from dropfx.draws.draw_plan import DrawPlan
from dropfx.graph.nodes import value_of
from dropfx.graph.notes import forms_of, notes
from dropfx.graph.pass_infra import Context
from dropfx.ops.triton_available import why_no_kernels
from dropfx.planning.cost_model import kept_share, lowered_times


class Choice(NamedTuple):
    """A lowering; the reason is "" where there was nothing to choose from."""

    lowering: str
    reason: str = ""


def choose(node: fx.Node, candidates: Mapping[str, Callable[..., Any]], context: Context) -> Choice:
    """The lowering of one gathered op.

    Args:
        candidates: what executes it, by lowering: "aten", and "triton" where there is a kernel.
    """
    asked, value = context.options.lowering, value_of(node)
    device = torch.device("cpu") if value is None else value.device
    why_not = why_no_kernels(device)
    if "triton" not in candidates:
        return Choice("aten", "no Triton kernel" if asked == "triton" else why_not if device.type == "cuda" else "")
    if asked != "auto":
        if asked == "triton" and not why_not:
            _measured(node, candidates, context, device)  # for the sake of its tiles
        return Choice(asked, "asked for")
    if why_not:
        return Choice("aten", why_not if device.type == "cuda" else "")
    found = _measured(node, candidates, context, device)
    if isinstance(found, str):
        return _predicted(node, context, found)
    fastest = min(found, key=lambda name: found[name])
    times = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in found.items())
    return Choice(fastest, f"measured, forward and backward: {times}")


def _predicted(node: fx.Node, context: Context, why: str) -> Choice:
    """By the cost table, where there is no measurement; copies where it has no opinion."""
    if node.target is not ops.linear_op:
        return Choice("aten", why)
    reads, makes = (kept_share(form, context) for form in forms_of(node))
    times = lowered_times(node, reads, makes, context.costs)
    return Choice(min(times, key=lambda name: times[name]), f"by the device's cost table; {why}")


# -- measurement ----------------------------------------------------------------------------------------------------


def _measured(
    node: fx.Node, candidates: Mapping[str, Callable[..., Any]], context: Context, device: torch.device
) -> dict[str, float] | str:
    """Seconds by lowering, or why they cannot be had."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "not measured: a CUDA graph is being captured"
    if context.options.pattern.on_host and "starts" in context.options.pattern.fields:
        return "not measured: its width varies from one training step to the next"
    from dropfx.planning.autotune import tuner_for  # imports Triton

    with unset_fake_temporarily(), torch.inference_mode(False), torch.enable_grad():
        try:
            example = _Example(node, context, device)
            steps = {name: example.step(op) for name, op in candidates.items()}
            return tuner_for(device).measure(example.key, steps)
        except _UnknownShape:
            return "not measured: not all of its shapes are known before the graph runs"
        except torch.OutOfMemoryError:
            return "not measured: no memory for a trial"
        except Exception as error:
            return f"not measured: a trial fails: {(str(error).splitlines() or [type(error).__name__])[0]}"


class _UnknownShape(Exception):
    pass


class _Example:
    """Operands of a gathered op, as large as those that it was traced with; no number of PyTorch's generators is used.

    Attributes:
        key: the op with all that its time depends on.
    """

    def __init__(self, node: fx.Node, context: Context, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(0)
        self._draws, self._context, self._device = self._known(context, device), context, device
        self._args = [self._value(argument) for argument in node.args]
        self._leaves = [a for a in self._args if isinstance(a, Tensor) and a.requires_grad]
        shown = ", ".join(_shown(argument) for argument in self._args)
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        self.key = f"{node.target}({shown})" + (f" under {autocast}" if autocast else "")

    def step(self, op: Callable[..., Any]) -> Callable[[], object]:
        """Forward and backward by `op`."""

        def run() -> None:
            """Forward, and backward where an operand asks for a gradient."""
            out = op(*self._args)
            if self._leaves:
                torch.autograd.grad(out, self._leaves, torch.ones_like(out))

        return run

    @staticmethod
    def _known(context: Context, device: torch.device) -> dict[fx.Node, Any]:
        """A draw in the place of each of its inputs."""
        known: dict[fx.Node, Any] = {}
        for index, nodes in context.draws.items():
            site = context.sites[index]
            if site.fit is None or site.pattern is None:
                continue
            plan = DrawPlan([site.name], [site.fit], site.pattern, device)
            source = "cpu" if site.pattern.on_host else device
            (draw,) = plan.draw(torch.zeros((), dtype=torch.int64, device=source))
            for name, node in nodes.items():
                known[node] = site.leading if name == "leading" else getattr(draw, name)
        return known

    def _value(self, argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        if argument in self._draws:
            return self._draws[argument]
        if argument.target is operator.mul:  # units of a view
            return operator.mul(*map(self._value, argument.args))
        value = value_of(argument)
        if value is None or not value.is_floating_point():
            raise _UnknownShape
        shape = list(value.shape)
        if (form := notes(argument).get("form")) is not None:
            shape[form.axis.dim] = self._draws[self._context.draws[form.site]["width"]] * form.axis.factor
        made = torch.empty(shape, dtype=value.dtype, device=self._device)
        if form is None and value.dim() == 2 and not value.is_contiguous() and value.t().is_contiguous():
            made = torch.empty(shape[::-1], dtype=value.dtype, device=self._device).t()
        made.normal_(generator=self._generator)
        return made.requires_grad_(bool(notes(argument).get("asks_gradient")))


def _shown(argument: Any) -> str:
    if not isinstance(argument, Tensor):
        return repr(argument)
    kind = f"{str(argument.dtype).removeprefix('torch.')}{list(argument.shape)}"
    stored = "" if argument.is_contiguous() else "^T"
    return kind + stored + (" grad" if argument.requires_grad else "")
