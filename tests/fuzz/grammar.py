"""The grammar: productions as data, each with a weight, a predicate on the shape of the value that it reads, and text.

Text is one statement or several: `$` is the new value, `{v}` the value read, further names in braces are made on
demand by `generate.Fields` (a Linear on the last axis, another value of the same shape, an axis, a rate, ...). Without
`$` the value itself is written to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Shape = tuple[int, ...]
Fits = Callable[[Shape], bool]

BATCH, NODES = 5, 7
"""Lengths of the axes that vary while a program is made; no fixed length has these factors."""
WIDTHS = (16, 24, 32, 48, 64)


def units(shape: Shape) -> bool:
    """The last axis is one of features, of a fixed width."""
    return shape[-1] % 8 == 0 and shape[-1] % BATCH > 0 and shape[-1] % NODES > 0


def any_shape(shape: Shape) -> bool:
    return True


def rank(*ranks: int) -> Fits:
    return lambda shape: len(shape) in ranks


def both(*conditions: Fits) -> Fits:
    return lambda shape: all(fits(shape) for fits in conditions)


def fixed(shape: Shape) -> bool:
    """The second axis is of a fixed length, so that BatchNorm can normalise it."""
    return len(shape) > 1 and shape[1] % BATCH > 0 and shape[1] % NODES > 0 and shape[1] > 1


class Production(NamedTuple):
    name: str
    weight: float
    fits: Fits
    text: str


def rules(prefix: str, weight: float, fits: Fits, *texts: str) -> list[Production]:
    """Productions that share a weight and a predicate."""
    return [Production(f"{prefix}: {text.splitlines()[0]}", weight / len(texts), fits, text) for text in texts]


PRODUCTS = [
    *rules("linear", 16, units, "$ = {linear}({v})"),
    *rules("linear again", 5, units, "$ = {shared}({v})"),
    *rules(
        "product",
        4,
        units,
        "$ = F.linear(weight={linear}.weight, bias={linear}.bias, input={v})",
        "$ = F.linear({v}, {linear}.weight)",
        "$ = F.linear({v}, {linear}.weight * 0.5, {linear}.bias)",
        "$ = {v} @ {matrix}",
        "$ = torch.matmul({v}, {matrix}) + {bias}",
        "$ = {v} @ {linear}.weight.T",
        "$ = torch.einsum('...i,ij->...j', {v}, {matrix})",
        "$ = torch.einsum('...i,ji->...j', {v}, {linear}.weight)",
        "$ = {linear}({v}) + {linear2}({v})",
        "$ = F.linear({v}, {tied}.weight.t().contiguous())",
    ),
    *rules(
        "product of matrices",
        2,
        both(units, rank(2)),
        "$ = torch.addmm({bias}, {v}, {matrix})",
        "$ = torch.addmm({bias}, {v}, {matrix}, beta=0.5, alpha=2.0)",
        "$ = torch.mm({v}, {matrix})",
        "$ = {v}.t() @ {v} * 0.1",
        "$ = torch.cat([{v}, {v}], -1) @ torch.cat([{matrix}, {matrix}], 0)",
    ),
    *rules(
        "batched product",
        3,
        rank(3),
        "$ = torch.bmm({v}, {v}.transpose(1, 2)) * 0.1",
        "$ = torch.bmm({v}.transpose(1, 2), {v}) * 0.1",
        "$ = ({v} @ {v}.mT).softmax(-1) @ {v}",
        "$ = F.dropout(({v} @ {v}.transpose(-1, -2)).softmax(-1), {p}, self.training) @ {v}",
        "$ = torch.einsum('bti,bsi->bts', {v}, {v}) * 0.1",
        "$ = torch.baddbmm({v}, {v} @ {v}.mT, {v}, alpha=0.1)",
    ),
    *rules(
        "layer",
        3,
        units,
        "$ = {block}({v})",
        "$ = {block}({block}({v}))",
        "$ = {sequential}({v})",
        "$ = F.layer_norm({v}, ({n},))",
    ),
    *rules("norm", 4, units, "$ = {layer_norm}({v})", "$ = {rms_norm}({v})"),
    *rules("batch norm", 2, both(fixed, rank(2, 3)), "$ = {batch_norm}({v})"),
    *rules("transposed linear", 2, both(fixed, rank(3)), "$ = {linear_of_rows}({v}.transpose(1, 2)).transpose(1, 2)"),
    *rules("convolution", 1, both(fixed, rank(3)), "$ = {convolution}({v})"),
    *rules("embedding", 2, any_shape, "$ = {embedding}(i)", "$ = F.embedding(i, {shared_weight})"),
    *rules(
        "recurrent",
        2,
        both(units, rank(3)),
        "$, _ = {lstm}({v})",
        "$, _ = {gru}({v})",
        "$, _ = {rnn}({drop}({v}))",
        "$ = {lstm}({v})[1][0].transpose(0, 1)",
        "h = {v}[:, 0]\nfor t in range({v}.size(1)):\n    h = {drop}({cell}({v}[:, t], h))\n$ = h",
    ),
]
DROPOUTS = [
    *rules("dropout", 14, any_shape, "$ = {drop}({v})"),
    *rules("dropout and linear", 8, units, "$ = {linear}({drop}({v}))", "$ = {drop}({linear}({v}))"),
    *rules(
        "feed forward",
        8,
        units,
        "$ = {linear2}({drop}(F.{act}({square}({v}))))",
        "$ = {linear2}({drop}(F.{act}({square}({v})))) + {linear}({v})",
        "$ = {v} + {drop}({square}({v}))",
        "$ = {linear}({drop}(F.silu({square}({v})) * {v}))",
    ),
    *rules(
        "functional dropout",
        8,
        any_shape,
        "$ = F.dropout({v}, {p}, self.training)",
        "$ = F.dropout({v}, self.p, self.training)",
        "$ = F.dropout(input={v}, p={p}, training=True)",
        "$ = F.dropout({v}, {p}, self.training, inplace=True)",
        "F.dropout({v}, {p}, self.training, True)",
        "$ = F.dropout({v}, self.cfg.p, self.training)",
        "$ = F.dropout({v}, {p}, {drop}.training)",
        "$ = F.dropout({v}, {drop}.p, {drop}.training)",
    ),
    *rules("in-place dropout", 2, any_shape, "$ = {drop_}({v})", "{drop_}({v})", "{drop_}({v}.view({v}.shape))"),
    *rules("channels", 2, rank(3), "$ = {drop1d}({v})", "$ = F.dropout1d({v}, {p}, self.training)"),
    *rules(
        "merged channels",
        1,
        both(units, rank(3)),
        "t = torch.tanh({linear}({v})).transpose(1, 2)\n$ = t.flatten(1) * 0.5 + {drop1d}(t).flatten(1)",
        "t = {linear}({v})\n$ = t.flatten(1) - {drop}(t.relu()).flatten(1)",
    ),
    *rules("channels 2d", 2, rank(4), "$ = {drop2d}({v})", "$ = F.dropout2d({v}, {p}, self.training)"),
    *rules(
        "channels of convolutions",
        3,
        both(fixed, rank(3)),
        "$ = {narrow}(F.{act}({drop1d}({wide}({v}))))",
        "$ = {narrow}({own}({drop1d}({wide}({v}).relu())))",
        "$ = {narrow}(F.max_pool1d({drop1d}({wide}({v})), 3, 1, 1))",
        "$ = F.conv1d({drop}(F.{act}({wide}({v}))), {narrow}.weight[:, :, :1], {narrow}.bias)",
        "$ = {v} + {drop1d}({narrow}({wide}({v})))",
    ),
    *rules(
        "channels of convolutions 2d",
        4,
        both(fixed, rank(4)),
        "$ = {narrow2d}(F.{act}({drop2d}({wide2d}({v}))))",
        "$ = {narrow2d}(F.avg_pool2d({drop2d}({wide2d}({v})), 3, 1, 1)) + {v}",
        "$ = {narrow2d}({drop2d}({wide2d}({v}.contiguous(memory_format=torch.channels_last))))",
        "t = {drop2d}({wide2d}({v}))\n$ = {narrow2d}(t) * t.mean(1, keepdim=True)",
        "$ = {v} + {drop2d}(F.conv2d({drop}({wide2d}({v})), {narrow2d}.weight[:, :, :1, :1]))",
    ),
    *rules("dropped weight", 1, units, "$ = F.linear({v}, {drop}({linear}.weight), {linear}.bias)"),
    *rules(
        "mask by hand",
        3,
        any_shape,
        "$ = {v} * torch.bernoulli(torch.full_like({v}, {keep})) / {keep}",
        "$ = {v} * (torch.bernoulli(torch.full_like({v}, {keep})) / {keep})",
        "$ = {v} * {v}.new_empty({v}.shape[-1]).bernoulli_({keep}).div_({keep})",
        "mask = torch.empty_like({v}).bernoulli_({keep}) / {keep}\n$ = {v} * mask + {w} * mask",
        "t = {v}.new_empty({v}.shape[:1] + (1,) * ({v}.dim() - 1)).bernoulli_({keep}) / {keep}\n$ = {w} + {v} * t",
    ),
    *rules(
        "row branch",
        3,
        units,
        *(
            f"t = {mask}\n$ = {sum}"
            for mask in (
                "{v}.new_empty({v}.shape[:1] + (1,) * ({v}.dim() - 1)).bernoulli_({keep}).div_({keep})",
                "({keep} + torch.rand({v}.shape[:1] + (1,) * ({v}.dim() - 1), dtype={v}.dtype)).floor_() / {keep}",
                "F.dropout(torch.ones({v}.shape[:1] + (1,) * ({v}.dim() - 1), dtype={v}.dtype), {p})",
            )
            for sum in (
                "{v} + t * {linear}(torch.tanh({linear}({v})))",
                "{v} + {linear}({v} * {w}.mean(-1, keepdim=True)) * t * 0.5",
                "{linear}({drop}({v})) * t + {v}",
                "{v} + {drop}({square2}({drop}(F.{act}({square}({v}))))) * t",
            )
        ),
    ),
    *rules(
        "shared mask", 1, rank(3), "$ = {v} * {v}.new_empty({v}.size(0), 1, {v}.size(2)).bernoulli_({keep}).div({keep})"
    ),
    *rules("adjacency", 3, any_shape, "$ = {drop}(a) @ {linear_of_nodes}(f)", "$ = a @ {linear_of_nodes}({drop}(f))"),
    *rules(
        "other dropouts",
        1,
        any_shape,
        "$ = F.alpha_dropout({v}, {p}, self.training)",
        "$ = F.dropout({v} * 0 + 1, {p}) * {v}",
    ),
    *rules(
        "checkpoint",
        3,
        units,
        "$ = torch.utils.checkpoint.checkpoint(lambda t: {linear}({drop}(t)), {v}, use_reentrant=False)",
        "$ = torch.utils.checkpoint.checkpoint(lambda t: {linear}({drop}(t)), {v}, use_reentrant=True)",
        "$ = torch.utils.checkpoint.checkpoint({block}, {v}, use_reentrant=False)",
        "def body(t):\n    t = {linear}({drop}(t)) * 1.0\n    t.mul_(0.5)\n    return t\n"
        "$ = torch.utils.checkpoint.checkpoint(body, {v}, use_reentrant=False)",
    ),
    *rules(
        "region",
        3,
        units,
        "with torch.no_grad():\n    $ = {linear}({drop}({v}))",
        "with torch.no_grad():\n    t = {drop}({v})\n$ = {linear}(t) + {linear}({v})",
        "with torch.autocast('cpu', torch.bfloat16):\n    t = {linear}({drop}({v}))\n$ = t.to({v}.dtype)",
        "t = {drop}({v})\nwith torch.autocast('cpu', torch.bfloat16):\n    t = {linear}(t)\n$ = t.to({v}.dtype)",
        "with torch.enable_grad():\n    $ = {linear}({drop}({v}))",
    ),
]
UNITWISE = [
    *rules(
        "activation",
        12,
        any_shape,
        *(f"$ = F.{name}({{v}})" for name in ("relu", "gelu", "silu", "elu", "leaky_relu", "softsign", "mish", "selu")),
        *(f"$ = torch.{name}({{v}})" for name in ("tanh", "sigmoid", "sin", "cos", "erf", "abs", "neg", "atan")),
        "$ = F.softplus({v})",
        "$ = F.hardtanh({v}, -1.0, 0.5)",
        "$ = {v}.clamp(-0.5, 1.5)",
        "$ = {v}.clamp(min=0.1)",
        "$ = F.threshold({v}, 0.1, 0.2)",
        "$ = F.gelu({v}, approximate='tanh')",
        "$ = ({v} * 0.1).clamp(max=4.0).exp()",
        "$ = {v} * F.relu({v})",
        "$ = {v}.tanh().pow(2)",
        "$ = torch.where({v} > 0, {v}, {v} * 0.1)",
        "$ = torch.where({v} > 0, {v}, 1.0)",
        "$ = {v}.sign() * {v}",
    ),
    *rules(
        "arithmetic",
        6,
        any_shape,
        "$ = {v} + 0.5",
        "$ = 1.0 - {v}",
        "$ = {v} * 0.5",
        "$ = -{v}",
        "$ = {v} / 2",
        "$ = {v} * {v} * 0.3",
        "$ = 0.5 * {v} + {v}",
        "$ = {v} * self.scale",
        "$ = {v} * self.cfg.scale",
        "$ = {v} * G['scale']",
        "$ = {v}.detach()",
        "$ = {v}.clone()",
        "$ = {v}.contiguous()",
        "$ = {v} * {v}.size(0)",
        "$ = {v} / {v}.shape[-1]",
        "$ = torch.rsub({v}, 1.0)",
        "$ = {v} * torch.ones_like({v})",
        "$ = {v} + torch.zeros_like({v})",
        "$ = {v}.mul({v}.new_tensor(0.5))",
    ),
    *rules(
        "of two",
        9,
        any_shape,
        "$ = {v} + {w}",
        "$ = {w} + {v}",
        "$ = {v} - {w}",
        "$ = {v} * {w}",
        "$ = torch.add({v}, {w}, alpha=0.5)",
        "$ = torch.sub({w}, {v}, alpha=2)",
        "$ = torch.maximum({v}, {w})",
        "$ = F.silu({v}) * {w}",
        "$ = torch.where({w} > 0, {v}, {w})",
        "$ = torch.lerp({v}, {w}, 0.3)",
        "$ = torch.addcmul({v}, {w}, {v}, value=0.5)",
        "$ = torch.stack([{v}, {w}]).mean(0)",
        "$ = torch.cat([{v}, {w}], {d})",
        "$ = {v}.add({w}, alpha=0.25)",
    ),
    *rules(
        "broadcast",
        5,
        any_shape,
        "$ = {v} + {w}.mean({d}, keepdim=True)",
        "$ = {v} + {w}.select(0, 0)",
        "$ = {w} * {v}.sum({d}, keepdim=True)",
        "$ = torch.add({w}.unsqueeze(0), {v}.unsqueeze(1), alpha=0.5).mean(0)",
        "$ = {w}.narrow({d}, 0, 1) + {v}",
        "$ = torch.add({w}, {v}.narrow({d}, 0, 1), alpha=-1.5)",
        "$ = {v} - {v}.narrow(0, 0, 1)",
    ),
    *rules("vector", 3, units, "$ = {v} * {vector}", "$ = {v} + {vector}", "$ = {v} - {vector} * 0.5"),
]
