"""Flat arguments, which are all that the schema of a registered op knows, and the structs that everything else takes.

A parameter `rows: Kept | None` of a reference is `rows, rows_run` in the op, and `rows_leading = 0` at its end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from torch import Tensor

from dropfx.ops.kept import Kept


class Layout:
    """How the arguments of an op lie.

    Args:
        reference: a function whose annotations tell.
    """

    def __init__(self, reference: Callable[..., Any]) -> None:
        self._result = inspect.signature(reference, eval_str=True).return_annotation
        self._parameters = list(inspect.signature(reference, eval_str=True).parameters.values())
        self._kept = [_is_kept(parameter.annotation) for parameter in self._parameters]
        self._before = len(self._kept) + sum(self._kept)  # flat arguments before the lengths of leading axes
        self._places = list(self._find_places())

    def grouped(self, args: Sequence[Any]) -> list[Any]:
        """The reference's arguments, of the op's; defaults in the place of those left out at the end."""
        count = len(args)
        made = [
            args[at] if leading is None else Kept.of(args[at], args[at + 1], args[leading] if leading < count else 0)
            for at, leading in self._places
            if at < count
        ]
        return made + [parameter.default for parameter in self._parameters[len(made) :]]

    def _find_places(self) -> Iterator[tuple[int, int | None]]:
        """Of each argument, its place among the op's, and of one that is kept that of the leading axis' length."""
        at, leading = 0, self._before
        for kept in self._kept:
            yield at, leading if kept else None
            at, leading = at + 1 + kept, leading + kept

    def flat(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The op's arguments, of the reference's: values, or nodes of a graph; those left out at the end stay so."""
        made: list[Any] = []
        leading: list[Any] = []
        for kept, value in zip(self._kept, args, strict=False):
            if kept:
                starts, run, length = (None, 0, 0) if value is None else value
                made += [starts, run]
                leading.append(length)
            else:
                made.append(value)
        return *made, *(leading if len(args) == len(self._kept) else ())

    def flattened(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the op's arguments."""

        def call(*args: Any) -> Any:
            """What the function returns for them."""
            return function(*self.grouped(args))

        call.__name__ = function.__name__
        call.__signature__ = self._signature()  # type: ignore[attr-defined]
        return call

    def padded(self, gradients: Sequence[Any]) -> tuple[Any, ...]:
        """The gradients of the first arguments, and None for the others of the op."""
        return *gradients, *[None] * (self._before + sum(self._kept) - len(gradients))

    def _signature(self) -> inspect.Signature:
        made: list[inspect.Parameter] = []
        leading: list[inspect.Parameter] = []
        for kept, parameter in zip(self._kept, self._parameters, strict=True):
            if kept:
                starts = Tensor if parameter.annotation is Kept else Tensor | None
                integer = parameter.replace(annotation=int, default=0)
                run = integer if parameter.default is None else integer.replace(default=parameter.default)
                made += [parameter.replace(annotation=starts), run.replace(name=f"{parameter.name}_run")]
                leading.append(integer.replace(name=f"{parameter.name}_leading"))
            else:
                made.append(parameter)
        return inspect.Signature([*made, *leading], return_annotation=self._result)


def _is_kept(annotation: Any) -> bool:
    return annotation is Kept or Kept in get_args(annotation)
