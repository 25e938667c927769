"""Programs at random: each production is executed while the program is made, so no shape needs a rule of its own."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.grammar import BATCH, NODES, WIDTHS, Production
from tests.fuzz.grammar_views import PRODUCTIONS
from tests.fuzz.oracle import Raised, finite, train_step
from tests.fuzz.program import PRELUDE, Program, Statement, change
from tests.fuzz.steps import options, steps

SHAPES: tuple[tuple[int | str, ...], ...] = (("b",), ("b", 6), ("b", 6), ("b", "n"), ("b", 4, 6))
"""Of x without its last axis; "b" and "n" are the lengths that vary."""
RATES = (0.5, 0.5, 0.5, 0.25, 0.3, 0.75, 0.1)


class Fields(dict[str, str]):
    """What a production's text names in braces, made when it is asked for and the same within one text."""

    def __init__(self, maker: Maker, value: str) -> None:
        super().__init__(v=value)
        self.maker, self.shape = maker, maker.values[value].shape

    def __missing__(self, name: str) -> str:
        made = MAKERS[name](self.maker, self)
        self[name] = made
        return made


class Maker:
    """A program being made: its modules and values exist, in float64."""

    def __init__(self, choose: random.Random, shape: tuple[int | str, ...], width: int) -> None:
        self.choose, self.width = choose, width
        self.model: Any = nn.Module()
        self.names: dict[str, Any] = {"__name__": "fuzz_making"}
        exec(PRELUDE, self.names)
        self.names["self"] = self.model
        self.setup: list[str] = []
        self.body: list[Statement] = []
        self.values: dict[str, Tensor] = {}
        sizes = [{"b": BATCH, "n": NODES}.get(str(size)) or int(size) for size in shape]
        for name, made in (("x", sizes), ("a", [NODES, NODES]), ("f", [NODES, width])):
            self.names[name] = torch.randn(*made, dtype=torch.float64, requires_grad=True)
        self.names["i"] = torch.randint(20, (BATCH, 6))
        for line in ("self.cfg = Config()", "self.scale, self.p = 0.5, 0.4"):
            self.add(line)
        self.state("x * 1.0" if choose.random() < 0.9 else "x", "v0", "x", "input")

    def add(self, line: str) -> None:
        exec(line, self.names)
        self.setup.append(line)

    def module(self, kind: str, text: str) -> str:
        name = f"{kind}{len(self.setup)}"
        self.add(f"self.{name} = {text}")
        self.model.double()
        return f"self.{name}"

    def state(self, text: str, target: str, source: str, rule: str) -> bool:
        """Execute a statement and keep it, where PyTorch accepts it and its result is of use."""
        lines = text if "=" in text and rule != "input" else f"{target} = {text}"
        before = dict(self.names)
        try:
            exec(lines, self.names)
            made = self.names[target]
            useful = isinstance(made, Tensor) and made.is_floating_point() and 1 < made.dim() < 5
            if not useful or made.numel() > 40_000 or made.numel() == 0 or not made.detach().abs().max() < 1e4:
                raise ValueError(text)
        except Exception:
            self.names.clear()
            self.names.update(before)
            return False
        self.values[target] = made
        self.body.append(Statement(lines, target, source, rule))
        return True

    def produce(self, production: Production, value: str) -> bool:
        made = len(self.setup)
        target = f"v{len(self.body)}"
        try:
            text = production.text.format_map(Fields(self, value))
        except LookupError:
            self.forget(made)
            return False
        if "$" not in text:
            text += f"\n$ = {value}"
        if self.state(text.replace("$", target), target, value, production.name):
            return True
        self.forget(made)
        return False

    def forget(self, made: int) -> None:
        """Take back the modules after the first so many, so that no later production reads one of them."""
        for line in reversed(self.setup[made:]):
            if found := re.match(r"self\.(\w+) = ", line):
                delattr(self.model, found[1])
        del self.setup[made:]

    def grow(self, length: int) -> None:
        tries = 0
        while len(self.body) < length and tries < 6 * length:
            tries += 1
            recent = list(self.values)[-self.choose.choice((1, 1, 1, 2, 4)) :]
            value = self.choose.choice(recent)
            fitting = [p for p in PRODUCTIONS if p.fits(tuple(self.values[value].shape))]
            self.produce(self.choose.choices(fitting, [p.weight for p in fitting])[0], value)

    def outputs(self) -> tuple[str, ...]:
        names = list(self.values)
        others = self.choose.sample(names[1:] or names, min(self.choose.choice((0, 0, 1, 2)), len(names) - 1))
        return tuple(dict.fromkeys([names[-1], *others]))


# -- what a production asks for --------------------------------------------------------------------------------------

Make = Callable[[Maker, Fields], str]


def _out(maker: Maker, fields: Fields) -> int:
    """A width that a Linear emits: often one that is there already, so that values can be added."""
    wanted = [v.shape[-1] for v in maker.values.values() if v.shape[-1] in WIDTHS]
    return maker.choose.choice([*WIDTHS, *wanted[-2:], *wanted[-2:], fields.shape[-1]])


def _linear(maker: Maker, fields: Fields) -> str:
    out = fields.get("out") or str(_out(maker, fields))
    fields["out"] = out  # all Linears of one text emit the same width
    bias = "" if maker.choose.random() < 0.8 else ", bias=False"
    return maker.module("lin", f"nn.Linear({fields.shape[-1]}, {out}{bias})")


def _square(maker: Maker, fields: Fields) -> str:
    return maker.module("lin", f"nn.Linear({fields.shape[-1]}, {fields.shape[-1]})")


def _shared(maker: Maker, fields: Fields) -> str:
    """A Linear that was called before, or one whose weight is that of another."""
    layers = {f"self.{k}": m for k, m in maker.model.named_modules() if type(m) is nn.Linear and "." not in k}
    fitting = [name for name, layer in layers.items() if layer.in_features == fields.shape[-1]]
    if not fitting:
        raise LookupError
    name = maker.choose.choice(fitting)
    if maker.choose.random() < 0.7:
        return name
    tied = maker.module("tied", f"nn.Linear({fields.shape[-1]}, {layers[name].out_features})")
    maker.add(f"{tied}.weight = {name}.weight")
    return tied


def _tied(maker: Maker, fields: Fields) -> str:
    """A Linear that emits the width in hand: read backwards it consumes it."""
    fitting = [k for k, m in maker.model.named_modules() if type(m) is nn.Linear and m.out_features == fields.shape[-1]]
    return f"self.{maker.choose.choice([k for k in fitting if '.' not in k] or _nothing())}"


def _nothing() -> list[str]:
    raise LookupError


def _like(maker: Maker, fields: Fields) -> str:
    same = [name for name, value in maker.values.items() if value.shape == fields.shape]
    return maker.choose.choice(same)


def _matrix(maker: Maker, fields: Fields) -> str:
    out = fields.get("out") or str(_out(maker, fields))
    fields["out"] = out
    return maker.module("mat", f"nn.Parameter(torch.randn({fields.shape[-1]}, {out}) * 0.2)")


def _bias(maker: Maker, fields: Fields) -> str:
    _ = fields["matrix"] if "addmm" in fields else None
    out = fields.get("out") or str(_out(maker, fields))
    fields["out"] = out
    return maker.module("vec", f"nn.Parameter(torch.randn({out}))")


def _drop(maker: Maker, fields: Fields) -> str:
    old = [k for k, m in maker.model.named_children() if type(m) is nn.Dropout and not m.inplace]
    if old and maker.choose.random() < 0.2:
        return f"self.{maker.choose.choice(old)}"
    rate = maker.choice_rate() if maker.choose.random() < 0.95 else maker.choose.choice((0.0, 1.0))
    return maker.module("drop", f"nn.Dropout({rate})")


def _rate(maker: Maker) -> float:
    return maker.choose.choice(RATES)


Maker.choice_rate = _rate  # type: ignore[attr-defined]


def _module(kind: str, text: str) -> Make:
    """A module of its own; `n` is the last length, `m` the one before, `c` the second."""

    def make(maker: Maker, fields: Fields) -> str:
        shape, rate = fields.shape, _rate(maker)
        lengths = {"n": shape[-1], "m": shape[-2], "c": shape[1], "w": maker.width, "p": rate}
        return maker.module(kind, text.format(**lengths, h=maker.choose.choice(WIDTHS)))

    return make


MAKERS: dict[str, Make] = {
    "n": lambda maker, fields: str(fields.shape[-1]),
    "p": lambda maker, fields: str(_rate(maker)),
    "keep": lambda maker, fields: str(round(1 - _rate(maker), 6)),
    "d": lambda maker, fields: str(maker.choose.randrange(-len(fields.shape), len(fields.shape))),
    "d2": lambda maker, fields: str(maker.choose.randrange(-len(fields.shape), len(fields.shape))),
    "act": lambda maker, fields: maker.choose.choice(("relu", "gelu", "silu", "tanh", "sigmoid", "elu")),
    "w": _like,
    "linear": _linear,
    "linear2": _linear,
    "square": _square,
    "square2": _square,
    "shared": _shared,
    "tied": _tied,
    "matrix": _matrix,
    "bias": _bias,
    "vector": _module("vec", "nn.Parameter(torch.randn({n}))"),
    "drop": _drop,
    "drop_": _module("drop", "nn.Dropout({p}, inplace=True)"),
    "drop1d": _module("drop", "nn.Dropout1d({p})"),
    "drop2d": _module("drop", "nn.Dropout2d({p})"),
    "block": _module("block", "Block({n}, {h}, {p})"),
    "sequential": _module("seq", "nn.Sequential(nn.Linear({n}, {h}), nn.ReLU(), nn.Dropout({p}), nn.Linear({h}, {n}))"),
    "layer_norm": _module("norm", "nn.LayerNorm({n})"),
    "rms_norm": _module("norm", "nn.RMSNorm({n})"),
    "batch_norm": _module("norm", "nn.BatchNorm1d({c})"),
    "linear_of_rows": _module("lin", "nn.Linear({m}, {h})"),
    "linear_of_nodes": _module("lin", "nn.Linear({w}, {h})"),
    "wide": _module("conv", "nn.Conv1d({c}, 24, 3, padding=1)"),
    "own": _module("conv", "nn.Conv1d(24, 24, 3, padding=1, groups=24, bias=False)"),
    "narrow": _module("conv", "nn.Conv1d(24, {c}, 3, padding=1)"),
    "wide2d": _module("conv", "nn.Conv2d({c}, 24, 3, padding=1)"),
    "narrow2d": _module("conv", "nn.Conv2d(24, {c}, 3, padding='same')"),
    "convolution": _module("conv", "nn.Conv1d({c}, 6, 3, padding=1)"),
    "embedding": _module("emb", "nn.Embedding(20, {h})"),
    "shared_weight": _module("mat", "nn.Parameter(torch.randn(20, {h}))"),
    "lstm": _module("rnn", "nn.LSTM({n}, 16, num_layers=2, dropout={p}, batch_first=True)"),
    "gru": _module("rnn", "nn.GRU({n}, 16, num_layers=2, dropout={p}, batch_first=True, bidirectional=True)"),
    "rnn": _module("rnn", "nn.RNN({n}, 16, batch_first=True)"),
    "cell": _module("cell", "nn.GRUCell({n}, {n})"),
}


# -- programs --------------------------------------------------------------------------------------------------------


def generate(seed: int, index: int) -> Program:
    """The program of a seed and an index; about one in twenty is one that PyTorch itself refuses."""
    attempt = 0
    while True:
        program = _attempt(seed, index, attempt)
        attempt += 1
        if attempt > 8 or (index % 20 == 0 and _drops(program)) or (_drops(program) and _runs(program)):
            return program


def _attempt(seed: int, index: int, attempt: int) -> Program:
    choose = random.Random(f"{seed}:{index}:{attempt}")
    shape = (*choose.choice(SHAPES), choose.choice(WIDTHS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + index)
        maker = Maker(choose, shape, choose.choice(WIDTHS))
        maker.grow(choose.choice((3, 5, 8, 12, 16)))
    return Program(
        name=f"{seed}:{index}",
        setup=tuple(maker.setup),
        body=tuple(maker.body),
        outputs=maker.outputs(),
        shape=shape,
        width=maker.width,
        steps=steps(choose, maker.model, "\n".join(s.text for s in maker.body)),
        options=options(choose),
        half=choose.random() < 0.15,
    )


def _drops(program: Program) -> bool:
    return re.search(r"drop|bernoulli|block|seq|rnn", program.source().split("class Model")[1]) is not None


def _runs(program: Program) -> bool:
    """Whether PyTorch runs every step that is meant to run, to finite values."""
    with torch.random.fork_rng(devices=[]):
        model, names = program.make()
        for number, step in enumerate(program.steps):
            change(names, step.changes, number)
            dtype = next((p.dtype for p in model.parameters()), torch.float64)
            around: Any = eval(step.around or "__import__('contextlib').nullcontext()", {"torch": torch})
            outcome = train_step(model, model, program.inputs(step, number, dtype), around, step.second_order, number)
            if not step.bad and (isinstance(outcome, Raised) or not finite(outcome)):
                return False
    return True
