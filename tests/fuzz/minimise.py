"""A smaller program that fails alike: steps, changes, statements and outputs are dropped greedily."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator

from tests.fuzz.program import Program, Statement


def minimise(program: Program, fails: Callable[[Program], bool], seconds: float = 60.0) -> Program:
    """The smallest program found in the time given for which `fails` holds."""
    until = time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(program):
            if time.monotonic() > until:
                return program
            if fails(candidate):
                program, smaller = candidate, True
                break
    return program


def live(program: Program) -> Program:
    """The program without the statements that nothing reads."""
    needed, body = " ".join(program.outputs), list[Statement]()
    for statement in reversed(program.body):
        reads = re.findall(r"\bv\d+\b", statement.text)
        writes = re.search(r"_\(|[-+*]=|\] =|inplace", statement.text) is not None
        kept = any(re.search(rf"\b{name}\b", needed) for name in (reads if writes else [statement.target]))
        if kept:
            body.append(statement)
            needed += " " + statement.text
    return program.replaced(body=tuple(body[::-1]))


def _smaller(program: Program) -> Iterator[Program]:
    """Programs with a little less, the largest cuts first."""
    for k in reversed(range(len(program.steps))):
        if len(program.steps) > 1:
            yield program.replaced(steps=program.steps[:k] + program.steps[k + 1 :])
    if len(live(program).body) < len(program.body):
        yield live(program)
    for k in reversed(range(len(program.body))):
        yield from _without(program, k)
    for name in program.outputs:
        if len(program.outputs) > 1:
            yield program.replaced(outputs=tuple(other for other in program.outputs if other != name))
    for k, step in enumerate(program.steps):
        plainer = [{"around": ""}, {"second_order": False}, {"bad": False}]
        plainer += [{"changes": tuple(c for c in step.changes if c != line)} for line in step.changes]
        for fields in plainer:
            made = dataclasses.replace(step, **fields)
            if made != step:
                yield program.replaced(steps=(*program.steps[:k], made, *program.steps[k + 1 :]))
    if program.half:
        yield program.replaced(half=False)
    for option in program.options.split(", "):
        if option:
            yield program.replaced(options=", ".join(o for o in program.options.split(", ") if o != option))


def _without(program: Program, k: int) -> Iterator[Program]:
    """Without a statement: what read its result reads its source."""
    gone = program.body[k]
    if gone.target == gone.source or gone.rule == "input":
        return

    def renamed(text: str) -> str:
        return re.sub(rf"\b{gone.target}\b", gone.source, text)

    later = [dataclasses.replace(s, text=renamed(s.text), source=renamed(s.source)) for s in program.body[k + 1 :]]
    outputs = tuple(dict.fromkeys(map(renamed, program.outputs)))
    yield program.replaced(body=(*program.body[:k], *later), outputs=outputs)
