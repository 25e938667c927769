"""More productions: reductions, parts and joins, views, in-place writes, and branches."""

from __future__ import annotations

from tests.fuzz.grammar import DROPOUTS, PRODUCTS, UNITWISE, Production, Shape, any_shape, both, rank, rules, units


def even(shape: Shape) -> bool:
    return units(shape) and shape[-1] % 16 == 0


def longer(shape: Shape) -> bool:
    """Every axis has two positions or more."""
    return min(shape) > 1


AXES = [
    *rules(
        "reduction",
        6,
        any_shape,
        "$ = {v} - {v}.mean({d}, keepdim=True)",
        "$ = {v} - {v}.amax({d}, keepdim=True)",
        "$ = {v}.softmax({d})",
        "$ = 0.1 * {v}.log_softmax({d})",
        "$ = {v}.cumsum({d}) * 0.3",
        "$ = F.normalize({v} + 3.0, dim={d})",
        "$ = {v} * {v}.std({d}, keepdim=True, unbiased=False)",
        "$ = {v}.sum({d}, keepdim=True).expand({v}.shape) * 0.2",
        "$ = {v} + {v}.logsumexp({d}, keepdim=True)",
    ),
    *rules("reduced axis", 2, rank(3, 4), "$ = {v}.mean({d})", "$ = {v}.amax({d})", "$ = {v}.sum({d}) * 0.3"),
    *rules(
        "order",
        4,
        any_shape,
        "$ = {v}.flip({d})",
        "$ = {v}.roll(3, {d})",
        "$ = {v}.index_select({d}, torch.arange({v}.size({d})).flip(0))",
        "$ = {v}.gather({d}, torch.zeros_like({v}, dtype=torch.long))",
        "$ = {v}.masked_fill({v} > 0.5, 0.0)",
        "$ = {v}.masked_fill({w} < 0, 1.0)",
        "$ = {v}.tril()",
        "$ = F.pad({v}, (2, 6))[..., 2:-6]",
        "$ = {v}[..., torch.arange({v}.size(-1) - 1, -1, -1)]",
        "$ = {v}[[0, 0]]",
        "$ = {v}.repeat_interleave(2, 0)",
        "$ = {v}.repeat((2,) + (1,) * ({v}.dim() - 1))",
    ),
    *rules(
        "parts",
        6,
        even,
        "s, t = {v}.chunk(2, {d})\n$ = torch.cat([t, s], {d})",
        "s, t = {v}.chunk(2, -1)\n$ = s * F.silu(t)",
        "s, t = {v}.split([8, {n} - 8], -1)\n$ = torch.cat([t.tanh(), s], -1)",
        "s, t = torch.tensor_split({v}, 2, dim=-1)\n$ = s + t",
        "$ = torch.stack({v}.unbind({d}), {d})",
        "$ = torch.stack([t.relu() for t in {v}.unbind(0)])",
        "$ = {v}.select({d}, 0).unsqueeze({d}) + {v}",
        "$ = {v}.narrow(-1, 8, {n} - 8)",
        "$ = {v}[..., : {n} // 2]",
        "$ = {v}[..., ::2]",
        "$ = F.glu({v}, -1)",
        "$ = torch.cat([t.tanh() for t in {v}.split(8, -1)], dim=-1)",
    ),
    *rules(
        "rows",
        4,
        longer,
        "$ = {v}[1:]",
        "$ = {v}[:1]",
        "$ = {v}[:-1] + {v}[1:]",
        "$ = torch.cat([{v}[1:], {v}[:1]])",
        "$ = torch.cat([{v}, {w}])",
        "$ = {v}.select(0, 0).unsqueeze(0).expand({v}.shape)",
    ),
    *rules("first step", 1.5, rank(3, 4), "$ = {v}[:, 0]", "$ = {v}[:, -1]", "$ = {v}.select(1, 0)"),
]
VIEWS = [
    *rules(
        "view",
        5,
        any_shape,
        "$ = {v}.reshape(-1, {v}.size(-1)).tanh().reshape({v}.shape)",
        "$ = {v}.view({v}.shape)",
        "$ = {v}.unsqueeze({d}).tanh().squeeze({d})",
        "$ = {v}.transpose(0, 1).relu().transpose(0, 1)",
        "$ = {v}.transpose({d}, {d2})",
        "$ = {v}.movedim({d}, {d2})",
        "$ = {v}.flatten().view_as({v})",
        "$ = {v}.unsqueeze(0).expand(2, *{v}.shape)[1]",
        "$ = {v}.reshape(-1).reshape({v}.shape)",
        "$ = {v}.unsqueeze(1).squeeze()",
        "$ = {v}.mT",
        "$ = {v}.swapaxes({d}, -1)",
    ),
    *rules(
        "deeper", 3, rank(2, 3), "$ = {v}.unsqueeze({d})", "$ = {v}.unsqueeze(1).expand({v}.size(0), 6, *{v}.shape[1:])"
    ),
    *rules(
        "flatter",
        3,
        rank(3, 4),
        "$ = {v}.flatten(0, 1)",
        "$ = {v}.reshape(-1, {v}.size(-1))",
        "$ = {v}.flatten(-2)",
        "$ = {v}.flatten(1)",
        "$ = {v}.reshape({v}.size(0), -1)",
    ),
    *rules("permuted", 2, rank(3), "$ = {v}.permute(2, 0, 1)", "$ = {v}.permute(1, 0, 2)", "$ = {v}.transpose(1, 2)"),
    *rules(
        "heads",
        4,
        both(units, rank(2, 3)),
        "$ = {v}.unflatten(-1, (4, -1))",
        "$ = {v}.unflatten(-1, (-1, 8)).transpose(-1, -2).flatten(-2)",
        "$ = {v}.view(*{v}.shape[:-1], 4, {n} // 4).tanh().view({v}.shape)",
        "$ = {v}.reshape({v}.shape[0], -1, 8)",
        "$ = {v}.unflatten(-1, (4, -1)).transpose(1, 2).flatten(-2)",
        "$ = {v}.unflatten(-1, (2, -1)).unbind(-2)[1]",
    ),
]
WRITES = [
    *rules(
        "write",
        7,
        any_shape,
        "{v}.relu_()",
        "{v}.mul_(0.5)",
        "{v}.add_(0.25)",
        "$ = {v}.neg_()",
        "$ = {v}.tanh_()",
        "{v} += 0.5",
        "{v} *= 0.5",
        "F.relu({v}, inplace=True)",
        "F.dropout({v}, {p}, self.training, inplace=True)",
        "{v}.clamp_(-1.0, 1.0)",
        "{v}.zero_()",
        "{v}.fill_(0.5)",
        "{v}.masked_fill_({v} > 0.5, 0.25)",
        "{v}[0] = 0.5",
        "{v}[..., 0] = 1.0",
        "{v}[:, 1:] *= 2.0",
        "{v}[1:] += 1.0",
        "{v}.copy_({w} * 0.5)",
    ),
    *rules(
        "write of another", 4, any_shape, "{v} += {w}", "{v}.mul_({w})", "{v}.add_({w}, alpha=0.5)", "$ = {w}.sub_({v})"
    ),
    *rules(
        "write to a view",
        6,
        any_shape,
        "t = {v}.view({v}.shape)\nt.relu_()",
        "t = {v}.transpose(0, 1)\nt += 0.5\n$ = t.transpose(0, 1)",
        "t = {v}.view(-1)\nt.mul_(0.5)\n$ = {v} * 2.0",
        "t = {v}[0]\nt.add_(1.0)",
        "t = {v}.select({d}, 0)\nt.neg_()",
        "t = {v}.narrow({d}, 0, 1)\nt.mul_(3.0)\n$ = {v}.tanh()",
        "t = {v}.unsqueeze(0)\nt[0, 0] = 0.25\n$ = t.squeeze(0)",
        "t = {v}.flatten(0, 1)\nt.relu_()",
        "t = {v}.T\nt.add_(0.5)",
        "{drop_}({v}.view(-1, {v}.size(-1)))",
        "t = {v} * 0.5\nt[..., :2] = {v}[..., :2]\n$ = t",
        "t = torch.zeros_like({v})\nt.copy_({v})\n$ = t",
        "t = {v}.new_zeros({v}.shape)\nt[0] = {v}[0]\n$ = t + {v}",
        "t = {v}.detach()\nt.mul_(0.5)",
    ),
    *rules(
        "write to parts",
        5,
        even,
        "s, t = torch.tensor_split({v}, 2, dim=-1)\ns.relu_()\n$ = torch.cat([t, s], -1)",
        "s, t = {v}[..., : {n} // 2], {v}[..., {n} // 2 :]\ns.mul_(0.5)\n$ = torch.cat([t, s], -1)",
        "s, t = {v}.clone().chunk(2, -1)\n$ = torch.cat([s.relu(), t], -1)",
        "with torch.no_grad():\n    s, t = {v}.chunk(2, -1)\n    s.mul_(0.5)\n$ = {v} + 0.1",
        "s, t = torch.tensor_split({v}, 2, dim=-1)\nt += s\n$ = {v} * 0.5",
        "s, t = torch.tensor_split({v}, 2, dim=0)\ns.neg_()\n$ = {v}.tanh()",
        "s, t = torch.tensor_split({v}.relu(), 2, dim=-1)\n{drop_}(s)\n$ = torch.cat([s, t], -1)",
        "s, t = torch.max({v}, -1, keepdim=True)\ns.mul_(0.5)\n$ = {v} + s",
        "s, t = torch.var_mean({v}, -1, keepdim=True)\nt.neg_()\n$ = {v} + t",
    ),
]
PYTHON = [
    *rules(
        "branch",
        4,
        any_shape,
        "if self.training:\n    $ = {v} * 0.5\nelse:\n    $ = {v}",
        "if self.cfg.flag:\n    $ = {drop}({v})\nelse:\n    $ = {v} + 1.0",
        "if G['flag']:\n    $ = {v}.tanh()\nelse:\n    $ = {drop}({v})",
        "if {v}.size(0) > 4:\n    $ = {drop}({v})\nelse:\n    $ = {v} * 2.0",
        "$ = {drop}({v}) if {v}.dim() == 3 else {v}.relu()",
        "$ = {v} * self.cfg.scale if isinstance({drop}, nn.Dropout) else {v}",
        "$ = {v} if {drop}.p == 0.5 else {v} * 0.5",
    ),
    *rules("loop", 3, units, "$ = {v}\nfor layer in ({square}, {drop}, {square2}):\n    $ = layer($)"),
]
PRODUCTIONS: tuple[Production, ...] = (*PRODUCTS, *DROPOUTS, *UNITWISE, *AXES, *VIEWS, *WRITES, *PYTHON)
