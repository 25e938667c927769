"""Promise 2 for a program under one front end."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._dynamo.config
from torch import nn

import dropfx
from dropfx.draws.runtime import numbers_of_their_own
from dropfx.errors import DoubleBackwardError
from tests.fuzz.minimise import live
from tests.fuzz.oracle import Masks, Outcome, Raised, differences, finite, masked, merged, train_step
from tests.fuzz.program import Program, Step, change

FRONT_ENDS = ("compile", "eager", "aot_eager", "inductor")
HOOKS_ARE_SEEN = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
"""Without it Dynamo misses hooks that are added after the first call."""
NO_SECOND_ORDER = ("does not currently support double backward", "which requires create_graph=False")


@dataclasses.dataclass
class Verdict:
    """Of one program: whether both agree, how many of its steps were compared, and how many sites recorded.

    Attributes:
        kind: "same", "different", "raises" (dropfx alone), "silent" (PyTorch alone); "pytorch", where PyTorch's own
            compiler fails alike; "ill-conditioned", where PyTorch's own result hangs on the last digits of inputs and
            products; "dead draws", where what nobody reads was not drawn, and what comes behind draws other numbers.
    """

    kind: str = "same"
    step: int = -1
    lines: tuple[str, ...] = ()
    compared: int = 0
    sites: int = 0
    raising: bool = False

    @property
    def wrong(self) -> bool:
        return self.kind in ("different", "raises", "silent")


def compiled_by(front_end: str, model: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
    given = {"min_speedup": 0, **options}
    if front_end == "compile":
        return dropfx.compile(model, **given)
    return torch.compile(model, backend="dropfx", options={"inner": front_end, **given})


def check(program: Program, front_end: str) -> Verdict:
    """Run all steps; where they differ, ask whether PyTorch's compiler alone differs too.

    AOTAutograd drops what nothing reads, with the numbers that it would have drawn: there only live code is run.
    """
    lively = live(program)
    program = lively if front_end in ("aot_eager", "inductor") else program
    verdict = _check(program, front_end, with_dropfx=True)
    if verdict.wrong and front_end != "compile" and _fails_alone(program, front_end, verdict):
        verdict.kind = "pytorch"
    elif verdict.kind == "different" and _draws_in_vain(program) and not _check(lively, front_end, True).wrong:
        verdict.kind = "dead draws"
    return verdict


def _fails_alone(program: Program, front_end: str, verdict: Verdict) -> bool:
    """Whether PyTorch's compiler fails without dropfx, or in the same way where no dropout writes in place.

    The passes make dropouts functional, of whose gradients AOTAutograd takes strides for granted that they have not;
    and those of rate 1 it lets draw numbers, which eager code and its dropouts in place do not.
    """
    if _check(program, front_end, with_dropfx=False).wrong:
        return True
    alone = _check(_out_of_place(program), front_end, with_dropfx=False)
    return verdict.kind == alone.kind and (verdict.kind != "raises" or verdict.lines == alone.lines)


def _out_of_place(program: Program) -> Program:
    """The program whose dropouts return what they wrote."""
    setup = tuple(line.replace(", inplace=True)", ")") for line in program.setup)
    body = []
    for statement in program.body:
        text = re.sub(r"(F\.dropout\(.*self\.training), (?:inplace=)?True\)", r"\1)", statement.text)
        text = re.sub(r"(?m)^((?:F\.dropout|self\.drop\d+)\((\w+).*\))$", r"\2 = \1", text)
        body.append(dataclasses.replace(statement, text=text))
    return program.replaced(setup=setup, body=tuple(body))


def _draws_in_vain(program: Program) -> bool:
    """Whether a statement that nothing reads draws random numbers."""
    dead = set(program.body) - set(live(program).body)
    return any(re.search("drop|bernoulli|block|seq|rnn|layer", statement.text) for statement in dead)


def _check(program: Program, front_end: str, with_dropfx: bool) -> Verdict:
    options: dict[str, Any] = eval(f"dict({program.options})")
    torch._dynamo.reset()
    with warnings.catch_warnings(), _fallback_random(front_end), HOOKS_ARE_SEEN:
        warnings.simplefilter("ignore")
        original, names = program.make()
        model, own_names = program.make()
        call = compiled_by(front_end, model, options) if with_dropfx else torch.compile(model, backend=front_end)
        verdict = Verdict()
        for number, step in enumerate(program.steps):
            change(names, step.changes, number)
            change(own_names, step.changes, number)
            _step(program, step, number, (original, model, call), verdict)
            if verdict.kind != "same":
                verdict.step = number
                break
            _descend(model, original)
    return verdict


def _step(
    program: Program,
    step: Step,
    number: int,
    models: tuple[nn.Module, nn.Module, Callable[..., Any]],
    verdict: Verdict,
) -> None:
    original, model, call = models
    dtype = _dtype(program, model)
    given, same = (program.inputs(step, number, dtype) for _ in range(2))
    with dropfx.testing.record() as frames, numbers_of_their_own():
        actual = train_step(call, model, given, _around(step), step.second_order, number)
    masks = merged(frames)
    if masks is None:
        return
    with masked(original, masks, "'tile'" in program.options) as mode:
        expected = train_step(original, original, same, _around(step), step.second_order, number)
    verdict.raising |= isinstance(expected, Raised)
    rounding = _rounding(program, step, dtype)
    _judge(actual, expected, verdict, rounding)
    if verdict.kind == "different" and _ill_conditioned(program, step, number, original, masks, rounding):
        verdict.kind = "ill-conditioned"
    if verdict.kind == "same" and isinstance(expected, dict):
        verdict.compared += 1
        verdict.sites += len(masks)
        if mode.used != masks.keys():
            verdict.kind, verdict.lines = "different", (f"no such sites: {sorted(masks.keys() - mode.used)}",)


class Rounding(NamedTuple):
    """How far results may be apart, and by how much inputs change in their last digits."""

    tolerance: float
    digits: float


def _rounding(program: Program, step: Step, dtype: torch.dtype) -> Rounding:
    if dtype is torch.float64:
        return Rounding(1e-9, 1e-14)
    # of bfloat16 only gross faults show: a unit near the kink of a ReLU may fall on either side
    return Rounding(0.15, 4e-3) if "autocast" in step.around + program.source() else Rounding(2e-3, 1e-6)


def _ill_conditioned(
    program: Program, step: Step, number: int, original: nn.Module, masks: Masks, rounding: Rounding
) -> bool:
    """Whether plain PyTorch itself gives another result where inputs and products change in their last digits."""
    found = []
    dtype = _dtype(program, original)
    for shake in (0.0, rounding.digits):
        given = program.inputs(step, number, dtype)
        for name, value in given.items():
            if value.requires_grad:
                noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
                given[name] = (value.detach() * (1 + shake * noise)).requires_grad_()
        with masked(original, masks, "'tile'" in program.options, shake):
            found.append(train_step(original, original, given, _around(step), step.second_order, number))
    plain, shaken = found
    alike = isinstance(plain, dict) and isinstance(shaken, dict)
    return alike and bool(differences(shaken, plain, rounding.tolerance))


def _dtype(program: Program, model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32 if program.half else torch.float64)


def _judge(actual: Outcome, expected: Outcome, verdict: Verdict, rounding: Rounding) -> None:
    if isinstance(expected, Raised):
        # what autograd refuses for a write in place, a graph without writes computes
        if not isinstance(actual, Raised):
            if expected.stage == "forward":
                verdict.kind, verdict.lines = "silent", (f"expected {expected.error!r}",)
        elif not (isinstance(actual.error, (type(expected.error), RuntimeError))):
            verdict.kind, verdict.lines = "raises", (f"{actual.error!r} instead of {expected.error!r}",)
    elif isinstance(actual, Raised):
        if not _accepted(actual.error):
            verdict.kind, verdict.lines = "raises", (f"{actual.stage}: {type(actual.error).__name__}: {actual.error}",)
    elif finite(expected) and (lines := differences(actual, expected, rounding.tolerance)):
        verdict.kind, verdict.lines = "different", tuple(lines)


def _accepted(error: Exception) -> bool:
    """A second derivative of what has but a first, by name: dropfx's and AOTAutograd's."""
    return isinstance(error, DoubleBackwardError) or any(text in str(error) for text in NO_SECOND_ORDER)


def _around(step: Step) -> contextlib.AbstractContextManager[Any]:
    made: contextlib.AbstractContextManager[Any] = eval(step.around or "contextlib.nullcontext()")
    return made


def _fallback_random(front_end: str) -> contextlib.AbstractContextManager[Any]:
    """Inductor draws as PyTorch does."""
    if front_end != "inductor":
        return contextlib.nullcontext()
    import torch._inductor.config

    return torch._inductor.config.patch(fallback_random=True)


def _descend(model: nn.Module, original: nn.Module) -> None:
    """A step of SGD; the original takes over the result, so that rounding does not add up."""
    with torch.no_grad():
        for parameter, same in zip(model.parameters(), original.parameters(), strict=True):
            if parameter.grad is not None and torch.isfinite(parameter.grad).all():
                parameter -= 0.01 * parameter.grad.clamp(-1, 1)
            same.copy_(parameter)
        for buffer, same in zip(model.buffers(), original.buffers(), strict=True):
            same.copy_(buffer)


__all__ = ["FRONT_ENDS", "Masks", "Verdict", "check"]
