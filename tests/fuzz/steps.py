"""What happens from step to step: other lengths, changes of the model, regions around it; and options of dropfx."""

from __future__ import annotations

import random
import re
from typing import Any

from torch import nn

from tests.fuzz.program import Step

CHANGES: tuple[tuple[str, type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    ("rate", nn.Dropout, "m.{name}.p = {p}"),
    ("rate", nn.Dropout, "m.{name}.p = {p}"),
    ("rate of extremes", nn.Dropout, "m.{name}.p = {extreme}"),
    ("rates", nn.Module, "for d in m.modules():\n    if isinstance(d, nn.Dropout): d.p = {p}"),
    ("switch off", nn.Dropout, "m.{name}.eval()"),
    ("switch on", nn.Dropout, "m.{name}.train()"),
    ("new weight", nn.Linear, "m.{name}.weight = nn.Parameter(m.{name}.weight.detach() * 0.5)"),
    ("new layer", nn.Linear, "m.{name} = nn.Linear(m.{name}.in_features, m.{name}.out_features).to(m.{name}.weight)"),
    ("no bias", nn.Linear, "m.{name}.bias = None"),
    ("frozen", nn.Linear, "m.{name}.weight.requires_grad_(False)"),
    ("frozen all", nn.Module, "m.requires_grad_(False)"),
    ("thawed all", nn.Module, "m.requires_grad_(True)"),
    ("written weight", nn.Linear, "m.{name}.weight.data.mul_(0.5)"),
    ("hook", nn.Linear, "m.{name}.register_forward_hook(lambda module, args, out: out * 0.5)"),
    ("hook of dropout", nn.Dropout, "m.{name}.register_forward_hook(lambda module, args, out: out + 0.5)"),
    ("hook before", nn.Dropout, "m.{name}.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))"),
    ("identity", nn.Dropout, "m.{name} = nn.Identity(); m.{name}.p = 0.5"),
    ("another dropout", nn.Dropout, "m.{name} = nn.Dropout({p})"),
    ("norm off", (nn.BatchNorm1d, nn.LayerNorm), "m.{name}.eval()"),
    ("flag", nn.Module, "m.cfg.flag = not m.cfg.flag"),
    ("config", nn.Module, "m.cfg.scale, m.cfg.p = 0.25, {p}"),
    ("attribute", nn.Module, "m.scale, m.p = 0.75, {p}"),
    ("global", nn.Module, "G['flag'] = not G['flag']"),
    ("global", nn.Module, "G['scale'] = 0.3"),
    ("eval", nn.Module, "m.eval()"),
    ("train", nn.Module, "m.train()"),
    ("train", nn.Module, "m.train()"),
    ("float", nn.Module, "m.float()"),
)


def steps(choose: random.Random, model: nn.Module, body: str) -> tuple[Step, ...]:
    """Up to four steps, but often one or two, as most time is spent on compiling; the first changes nothing."""
    children = [(k, child) for k, child in model.named_children() if re.search(rf"\bself\.{k}\b", body)]
    second_order = choose.random() < 0.08
    sizes = [(choose.choice((4, 5, 6, 8)), choose.choice((7, 9, 12)))]
    made = [Step(*sizes[0], second_order=second_order)]
    for _ in range(choose.choice((0, 0, 1, 1, 2, 3))):
        if choose.random() < 0.4:
            sizes.append((choose.choice((1, 3, 5, 8, 9)), choose.choice((5, 7, 11, 16))))
        changes = [changed for _ in range(choose.choice((0, 1, 1, 2))) if (changed := _change(choose, children))]
        around, kind = "", choose.random()
        if kind < 0.04:
            around = "torch.no_grad()"
        elif kind < 0.1:
            around = "torch.autocast('cpu', torch.bfloat16)"
        bad = choose.random() < 0.03
        made.append(Step(*sizes[-1], tuple(changes), around, second_order and not around, bad))
    return tuple(made)


def _change(choose: random.Random, children: list[tuple[str, nn.Module]]) -> str:
    _, kind, text = choose.choice(CHANGES)
    rates: dict[str, Any] = {"p": choose.choice((0.2, 0.3, 0.5, 0.6, 0.75)), "extreme": choose.choice((0.0, 1.0))}
    if kind is nn.Module:
        return text.format(**rates)
    fitting = [name for name, child in children if type(child) in (kind if isinstance(kind, tuple) else (kind,))]
    return text.format(name=choose.choice(fitting), **rates) if fitting else ""


def options(choose: random.Random) -> str:
    """Options of dropfx as keywords."""
    pattern = choose.choices(
        ("", "pattern='block'", "block=4", "block=7", "pattern='slice'", "pattern='row'", "pattern='tile'"),
        (5, 2, 3, 2, 3, 2, 1),
    )[0]
    groups = choose.choices(("", "groups=1", "groups=2", "groups=3", "groups='time'"), (4, 3, 3, 2, 2))[0]
    if pattern.endswith("'tile'"):
        groups = ""
    return ", ".join(option for option in (pattern, groups) if option)
