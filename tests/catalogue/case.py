"""A case of the catalogue: a model with its inputs, and what must (`min_speedup=0`) and must not be rewritten in it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import dropfx
from dropfx.draws.runtime import numbers_of_their_own
from tests.oracle import comparison, oracle


class Draw:
    """Example tensors of a dtype from a generator of their own."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def ints(self, bound: int, *shape: int) -> Tensor:
        return torch.randint(bound, shape, generator=self.generator)


Inputs = Callable[[int, Draw], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its inputs, and what is expected of its sites."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    kwargs: Callable[[int, Draw], dict[str, Any]]
    rewritten: tuple[str, ...]  # sites that must have a mask
    left: tuple[str, ...]  # sites that must run as written
    optional: tuple[str, ...]  # sites of which the design says neither
    precision: torch.dtype | None  # the dtype whose tolerance holds, where it is not the model's
    state: Callable[[nn.Module], Any]  # what a forward leaves in plain attributes
    input_grad: bool
    batches: tuple[int, ...]  # batch sizes of the steps

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build().to(dtype).train()

    def call(
        self, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        draw = Draw(dtype, seed)
        return self.inputs(batch, draw), self.kwargs(batch, draw)


CASES: dict[str, Case] = {}


def vectors(width: int = 64, *between: int) -> Inputs:
    """One input [batch, *between, width]."""
    return lambda batch, draw: (draw(batch, *between, width),)


def tokens(bound: int = 50, length: int = 7) -> Inputs:
    """One input of integers [batch, length] below `bound`."""
    return lambda batch, draw: (draw.ints(bound, batch, length),)


def case(
    name: str,
    inputs: Inputs | None = None,
    *,
    kwargs: Callable[[int, Draw], dict[str, Any]] = lambda batch, draw: {},
    rewritten: tuple[str, ...] = (),
    left: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    precision: torch.dtype | None = None,
    state: Callable[[nn.Module], Any] = lambda model: None,
    input_grad: bool = True,
    batches: tuple[int, ...] = (4, 3),
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Put the decorated factory (a function or a class without arguments) into the catalogue."""

    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        assert name not in CASES, name
        CASES[name] = Case(
            name,
            build,
            inputs or vectors(),
            kwargs,
            rewritten,
            left,
            optional,
            precision,
            state,
            input_grad,
            batches,
        )
        return build

    return add


def mlp(*widths: int, p: float = 0.5, activation: type[nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    """Linear, activation, Dropout, ..., Linear over the widths; its sites are "2", "5", ..."""
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(inner, outer, bias=bias), activation(), nn.Dropout(p)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=bias))


@contextlib.contextmanager
def recording() -> Iterator[oracle.Masks]:
    """All masks recorded inside, as one dict; a model compiled child by child records a dict a child."""
    merged: oracle.Masks = {}
    with dropfx.testing.record() as recorded:
        yield merged
    for masks in recorded:
        for name, mask in masks.items():
            assert name not in merged, f"site {name!r} recorded twice in one forward"
            merged[name] = mask


def compiled_run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    input_grad: bool = True,
) -> tuple[oracle.Outcome, oracle.Masks]:
    """A forward and backward of a compiled model, and the masks that its forward recorded."""
    oracle.set_seed(seed)
    masks: oracle.Masks = {}

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with recording() as recorded, numbers_of_their_own():  # what else is random repeats in the original
            yield
        masks.update(recorded)

    outcome = oracle.run(model, args, kwargs, around=around(), input_grad=input_grad)
    return outcome, masks


def check_step(
    original: nn.Module,
    compiled: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    left_alone: Container[str] = (),
    input_grad: bool = True,
    exact_zeros: bool = True,
) -> oracle.Masks:
    """Promise 2 for one step of both models; the masks of the step."""
    actual, masks = compiled_run(compiled, args, kwargs, seed=seed, input_grad=input_grad)
    expected = oracle.oracle_run(
        original,
        masks,
        args,
        kwargs,
        seed=seed,
        left_alone=left_alone.__contains__,
        input_grad=input_grad,
    )
    comparison.compare(actual, expected, dtype, exact_zeros)
    return masks


def pair(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The original and the compiled model, built alike. Everything that can be rewritten is."""
    return case.make(dtype), dropfx.compile(case.make(dtype), **{"min_speedup": 0, **options})


def check_case(case: Case, dtype: torch.dtype, batches: tuple[int, ...] | None = None, **options: Any) -> None:
    """Promise 2 for some training steps, and that exactly the expected sites are rewritten."""
    original, compiled = pair(case, dtype, **options)
    for step, batch in enumerate(batches or case.batches):
        args, kwargs = case.call(batch, dtype, seed=step)
        masks = check_step(
            original,
            compiled,
            args,
            kwargs,
            dtype=case.precision or dtype,
            seed=100 + step,
            left_alone=case.left + case.optional,
            input_grad=case.input_grad,
        )
        assert set(case.rewritten) <= set(masks), f"not rewritten: {set(case.rewritten) - set(masks)}"
        assert set(masks) <= set(case.rewritten + case.optional), f"recorded: {sorted(masks)}"
        assert case.state(compiled) == case.state(original)
        sgd_step(compiled, original)


def sgd_step(compiled: nn.Module, original: nn.Module, rate: float = 0.01) -> None:
    """One step of SGD on the compiled model; the original takes over the result, so that rounding does not add up."""
    with torch.no_grad():
        for parameter, same in zip(compiled.parameters(), original.parameters(), strict=True):
            if parameter.grad is not None:
                parameter -= rate * parameter.grad.to_dense()
            same.copy_(parameter)
