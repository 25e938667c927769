"""Masks made by hand: AWD-LSTM's dropouts, which are one mask for all time steps, and masks that are something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable

from tests.catalogue.case import case, vectors


class RNNDropout(nn.Module):
    """As in fastai: one mask for all time steps of a sample."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        return x * self.mask(x, (x.size(0), 1, x.size(2)))

    def mask(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        return x.new(*sizes).bernoulli_(1 - self.p).div_(1 - self.p)


class NewerRNNDropout(RNNDropout):
    def mask(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        return x.new_empty(*sizes).bernoulli_(1 - self.p).div_(1 - self.p)


class LockedDropout(nn.Module):
    """As in awd-lstm-lm: one mask along the first axis, of tensors that were Variables once."""

    def forward(self, x: Tensor, dropout: float = 0.5) -> Tensor:
        if not self.training or not dropout:
            return x
        m = x.data.new(1, x.size(1), x.size(2)).bernoulli_(1 - dropout)
        mask = Variable(m, requires_grad=False) / (1 - dropout)
        mask = mask.expand_as(x)
        return mask * x


class TorchnlpLockedDropout(nn.Module):
    def __init__(self, p: float = 0.25) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        x = x.clone()
        mask = x.new_empty(1, x.size(1), x.size(2), requires_grad=False).bernoulli_(1 - self.p)
        mask = mask.div_(1 - self.p)
        mask = mask.expand_as(x)
        return x * mask


class Between(nn.Module):
    """A Linear before and one behind what is given."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.lin1, self.drop, self.lin2 = nn.Linear(64, 96), drop, nn.Linear(96, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.drop(torch.tanh(self.lin1(x))))


RECOGNISED: dict[str, type[nn.Module]] = {
    "rnn_dropout": RNNDropout,
    "rnn_dropout_newer": NewerRNNDropout,
    "locked_dropout": LockedDropout,
    "locked_dropout_torchnlp": TorchnlpLockedDropout,
}
for _name, _drop in RECOGNISED.items():
    case(_name, vectors(64, 5), rewritten=("drop:bernoulli_1",))(lambda drop=_drop: Between(drop()))


class ByHand(nn.Module):
    """A forward of choice."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], keep: float = 0.75) -> None:
        super().__init__()
        self.body, self.keep = body, keep

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)

    def draw(self, memory: Tensor) -> Tensor:
        """Also names the operation in the class, where `dropfx.compile` looks for what may drop."""
        return memory.bernoulli_(self.keep)


def statements(m: ByHand, x: Tensor) -> Tensor:
    mask = torch.empty(x.shape[-1], dtype=x.dtype)
    m.draw(mask)
    mask.div_(m.keep)
    return x * mask


def functions(m: ByHand, x: Tensor) -> Tensor:
    return torch.mul(torch.bernoulli(torch.empty_like(x[:, :1]), p=m.keep), 1 / m.keep) * x


def in_place(m: ByHand, x: Tensor) -> Tensor:
    x = x * 0.5
    x *= m.draw(torch.zeros_like(x)).div_(m.keep)
    return x


def probabilities(m: ByHand, x: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.full_like(x[:, :1], m.keep)).div_(m.keep)


def probabilities_by_size(m: ByHand, x: Tensor) -> Tensor:
    return x * (torch.bernoulli(x.new_full((x.size(0), 1, x.size(2)), fill_value=m.keep)) / m.keep)


def fresh_each_time(m: ByHand, x: Tensor) -> Tensor:
    for _ in range(2):
        x = x * m.draw(x.new_empty(x.size(0), 1, x.size(2))).div(m.keep)
    return F.dropout(x, 0.5)


def spelled(body: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return Between(ByHand(body))


for _body in (statements, functions, in_place, probabilities, probabilities_by_size):
    case(f"mask_{_body.__name__}", vectors(64, 5), rewritten=("drop:bernoulli_1",))(lambda b=_body: spelled(b))
case(
    "mask_fresh_each_time",
    vectors(64, 5),
    rewritten=("drop:bernoulli_1", "drop:dropout_1"),
    left=("drop:bernoulli_2",),
)(lambda: spelled(fresh_each_time))


def used_twice(m: ByHand, x: Tensor) -> Tensor:
    mask = m.draw(x.new_empty(x.size(0), 1, x.size(2))).div_(m.keep)
    return x * mask + x.sin() * mask


def used_in_a_loop(m: ByHand, x: Tensor) -> Tensor:
    """One mask of all steps, on the values of each."""
    mask = torch.bernoulli(torch.full((x.size(0), x.size(2)), m.keep, dtype=x.dtype)) / m.keep
    return torch.stack([row.tanh() * mask for row in x.unbind(1)], 1)


def used_by_other_names(m: ByHand, x: Tensor) -> Tensor:
    """Views of it, scaled apart, and by products written otherwise."""
    drawn = m.draw(torch.empty_like(x[:, 0]))
    mask, again = drawn / m.keep, (1 / m.keep) * drawn
    steps = torch.mul(mask.detach().unsqueeze(1).expand_as(x), x)
    return steps + x.cos() * again.unsqueeze(-2) + (x[:, 0] * mask.expand(x.size(0), -1)).unsqueeze(1)


def used_with_another_product(m: ByHand, x: Tensor) -> Tensor:
    """Its units are dropped everywhere; of two products of masks it is a factor."""
    mask = m.draw(x.new_empty(x.size(0), 1, x.size(2))).div_(m.keep)
    return (x * mask).sin() * mask


SEVERAL = (used_twice, used_in_a_loop, used_by_other_names, used_with_another_product)
"""One mask of several products."""
for _body in SEVERAL:
    case(f"mask_{_body.__name__}", vectors(64, 5), rewritten=("drop:bernoulli_1",))(lambda b=_body: spelled(b))


def draw_used_twice(m: ByHand, x: Tensor) -> Tensor:
    kept = m.draw(x.new_empty(x.size(0), 1, x.size(2)))
    return x * (kept / m.keep) * kept.mean()


def without_scale(m: ByHand, x: Tensor) -> Tensor:
    return x * m.draw(x.new_empty(x.size(0), 1, x.size(2)))


def other_scale(m: ByHand, x: Tensor) -> Tensor:
    return x * m.draw(x.new_empty(x.size(0), 1, x.size(2))).div_(0.7)


def one_value_a_sample(m: ByHand, x: Tensor) -> Tensor:
    """Stochastic depth."""
    return x * m.draw(x.new_empty(x.size(0), 1, 1)).div_(m.keep)


def expanded_units(m: ByHand, x: Tensor) -> Tensor:
    return x * m.draw(x.new_empty(x.size(0), 1, 1)).div_(m.keep).expand_as(x)


def other_probability(m: ByHand, x: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.full_like(x[:, :1], 0.7)).div_(m.keep)


def several_probabilities(m: ByHand, x: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.linspace(0.5, 1, x.size(2), dtype=x.dtype)).div_(m.keep)


def written_probabilities(m: ByHand, x: Tensor) -> Tensor:
    filled = torch.full_like(x[:, :1], m.keep)
    filled[..., 0] = 1.0
    return x * torch.bernoulli(filled).div_(m.keep)


def read_as_a_value(m: ByHand, x: Tensor) -> Tensor:
    mask = m.draw(x.new_empty(x.size(0), 1, x.size(2))).div_(m.keep)
    return x * mask + mask.sum()


def added_to_itself(m: ByHand, x: Tensor) -> Tensor:
    mask = m.draw(x.new_empty(x.size(0), 1, x.size(2))).div_(m.keep)
    return x * mask + x.sin() * (mask + mask)


def squared(m: ByHand, x: Tensor) -> Tensor:
    mask = m.draw(x.new_empty(x.size(0), 1, x.size(2))).div_(m.keep)
    return x * mask + x * (mask * mask)


def scaled_between(m: ByHand, x: Tensor) -> Tensor:
    """Another mask from the second step on."""
    mask = torch.bernoulli(torch.full((x.size(0), x.size(2)), m.keep, dtype=x.dtype)) / m.keep
    rows = []
    for row in x.unbind(1):
        rows.append(row * mask)
        mask = mask * 0.9
    return torch.stack(rows, 1)


def written_between(m: ByHand, x: Tensor) -> Tensor:
    mask = torch.bernoulli(torch.full((x.size(0), x.size(2)), m.keep, dtype=x.dtype)) / m.keep
    rows = []
    for row in x.unbind(1):
        rows.append(row.detach() * mask)
        mask.mul_(0.9)
    return torch.stack(rows, 1)


def one_column_in_a_loop(m: ByHand, x: Tensor) -> Tensor:
    mask = torch.bernoulli(torch.full((x.size(0), 1), m.keep, dtype=x.dtype)) / m.keep
    return torch.stack([row * mask for row in x.unbind(1)], 1)


def along_another_axis(m: ByHand, x: Tensor) -> Tensor:
    """Once it drops units, once steps."""
    mask = m.draw(x.new_empty(x.size(2))).div_(m.keep)
    return x * mask + (x[..., :1] * mask).sum(-1, keepdim=True)


def unsqueezed_behind_an_expansion(m: ByHand, x: Tensor) -> Tensor:
    """The axes that it names are the expansion's."""
    mask = m.draw(x.new_empty(x.size(2))).div_(m.keep)
    return x * mask + (x.unsqueeze(0) * mask.expand(x.shape).unsqueeze(0)).squeeze(0)


def probabilities_in_place(m: ByHand, x: Tensor) -> Tensor:
    return x * x.new_empty(x.shape).bernoulli_(torch.full_like(x, m.keep)).div_(m.keep)


def broadcasts_x(m: ByHand, x: Tensor) -> Tensor:
    return (x[:, :1] * m.draw(x.new_empty(x.shape)).div_(m.keep)).sum(1, keepdim=True)


def written_later(m: ByHand, x: Tensor) -> Tensor:
    mask = m.draw(x.new_empty(x.size(0), 1, x.size(2))).div_(m.keep)
    mask[:, :, 0] = 1.0
    return x * mask


def integers(m: ByHand, x: Tensor) -> Tensor:
    return x * torch.empty(x.shape, dtype=torch.int64).bernoulli_(m.keep)


OTHERS = (
    draw_used_twice,
    without_scale,
    other_scale,
    expanded_units,
    other_probability,
    several_probabilities,
    written_probabilities,
    read_as_a_value,
    added_to_itself,
    squared,
    scaled_between,
    written_between,
    one_column_in_a_loop,
    along_another_axis,
    unsqueezed_behind_an_expansion,
    probabilities_in_place,
    broadcasts_x,
    written_later,
    integers,
)
"""Draws that are no dropout of units, or of which more is read than the product."""
case("mask_of_rows", vectors(64, 5), rewritten=("drop:bernoulli_1",))(lambda: spelled(one_value_a_sample))
for _body in OTHERS:
    case(f"no_mask_{_body.__name__}", vectors(64, 5))(lambda b=_body: spelled(b))


@case("no_mask_kept", vectors(64, 5), rewritten=("out",), state=lambda m: m.drop.mask.shape)
class Keeps(Between):
    """A mask that outlives the call, as an attribute."""

    def __init__(self) -> None:
        super().__init__(KeepsMask())
        self.out, self.lin3 = nn.Dropout(0.5), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin3(self.out(super().forward(x)))


class KeepsMask(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.mask = x.new_empty(x.size(0), 1, x.size(2)).bernoulli_(0.5).div_(0.5)
        return x * self.mask
