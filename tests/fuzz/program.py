"""A program: a model as source text, its inputs from step to step, and what is changed between the steps."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import linecache
import re
from typing import Any

import torch
from torch import Tensor, nn

PRELUDE = """\
import torch
import torch.nn.functional as F
from torch import nn
import torch.utils.checkpoint


class Config:
    def __init__(self):
        self.flag, self.scale, self.p = True, 0.5, 0.4


class Block(nn.Module):
    def __init__(self, n, inner, p):
        super().__init__()
        self.up, self.down, self.p = nn.Linear(n, inner), nn.Linear(inner, n), p

    def forward(self, x):
        return x + self.down(F.dropout(F.gelu(self.up(x)), self.p, self.training))


G = {"flag": True, "scale": 0.5}
"""
INPUTS = ("x", "i", "a", "f")
"""Floats of any rank, integers [b, 6] below 20, a dense adjacency [n, n], features [n, width]."""


@dataclasses.dataclass(frozen=True)
class Statement:
    """Lines of a forward that make `target` of `source` and others."""

    text: str
    target: str
    source: str
    rule: str


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        batch, nodes: lengths of the two axes that vary.
        changes: statements on the model `m` and the globals, before the call.
        around: a context manager around the call, "" for none.
        second_order: the penalty of the input's gradient is added to the loss.
        bad: the input has another width than the model is made for.
    """

    batch: int
    nodes: int
    changes: tuple[str, ...] = ()
    around: str = ""
    second_order: bool = False
    bad: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """All of it; the same program makes the same models and inputs every time."""

    name: str
    setup: tuple[str, ...]
    body: tuple[Statement, ...]
    outputs: tuple[str, ...]
    shape: tuple[int | str, ...]  # of x; "b" is the batch, "n" the nodes
    width: int  # of f
    steps: tuple[Step, ...]
    options: str  # of dropfx, as keywords
    half: bool  # float32 rather than float64

    def source(self) -> str:
        setup = "\n".join(f"        {line}" for line in self.used_setup()) or "        pass"
        body = "\n".join(f"        {line}" for s in self.body for line in s.text.splitlines())
        model = f"class Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n{setup}\n"
        forward = f"    def forward(self, {', '.join(INPUTS)}):\n{body}\n        return {', '.join(self.outputs)},\n"
        return f"{PRELUDE}\n\n{model}\n{forward}"

    def used_setup(self) -> list[str]:
        read = "\n".join([s.text for s in self.body])
        used: list[str] = []
        always, modules = self.setup[:2], self.setup[2:]
        for line in reversed(modules):  # one that ties its weight comes after the other
            if re.search(rf"\b{re.match(r'self.[a-z0-9]+', line)[0]}\b", read + "\n".join(used)):
                used.append(line)
        return [*always, *used[::-1]]

    def listing(self) -> str:
        """The program as one would write it down, without the prelude."""
        steps = "\n".join(f"# step {i}: {step}" for i, step in enumerate(self.steps))
        kind = "float32" if self.half else "float64"
        head = f"# {self.name}: options dict({self.options}), {kind}, x {self.shape}, f [n, {self.width}]"
        return f"{head}\n{self.source()[len(PRELUDE) :].strip()}\n{steps}"

    def make(self, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
        """A model, and the globals of its source."""
        source, file = self.source(), f"<fuzz {self.name} {next(_FILES)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        names: dict[str, Any] = {"__name__": "fuzz_program"}
        exec(compile(source, file, "exec"), names)
        torch.manual_seed(seed)
        model = names["Model"]().to(torch.float32 if self.half else torch.float64).train()
        names["m"] = model
        return model, names

    def inputs(self, step: Step, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        sizes = [{"b": step.batch, "n": step.nodes}.get(str(size)) or int(size) for size in self.shape]
        sizes[-1] += 3 if step.bad else 0
        floats = {"x": sizes, "a": [step.nodes, step.nodes], "f": [step.nodes, self.width]}
        made = {k: torch.randn(*v, generator=draw, dtype=torch.float64).to(dtype) for k, v in floats.items()}
        made["i"] = torch.randint(20, (step.batch, 6), generator=draw)
        return {name: made[name].requires_grad_(name != "i") for name in INPUTS}

    def replaced(self, **changes: Any) -> Program:
        return dataclasses.replace(self, **changes)


_FILES = itertools.count()


def change(names: dict[str, Any], lines: tuple[str, ...], seed: int) -> None:
    """Execute changes between steps, drawing alike for every model; those of a module that is gone do nothing."""
    torch.manual_seed(seed)
    for line in lines:
        with contextlib.suppress(AttributeError):
            exec(line, names)
