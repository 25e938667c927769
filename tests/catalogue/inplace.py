"""In-place operations, on the value, on its views, and on what the caller or a residual stream still reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.catalogue.case import case, vectors


@case("inplace_relu", rewritten=("2", "5"))
def inplace_relu() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(128, 96),
        nn.SiLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(96, 10),
    )


@case("inplace_dropout", rewritten=("2",))
def inplace_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.5, inplace=True), nn.Linear(128, 96))


class TwoLayers(nn.Module):
    """lin1, something between them, lin2."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.drop, self.lin2 = nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.between(self.lin1(x)))

    def between(self, h: Tensor) -> Tensor:
        raise NotImplementedError


@case("inplace_relu_seen_by_view", vectors(64, 3), rewritten=("drop",))
class SeenByView(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        rows = h.view(-1, 64)
        h.relu_()
        return self.drop(rows)


@case("inplace_relu_on_view", vectors(64, 3), rewritten=("drop",))
class OnView(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        h.view(-1, 64).relu_()
        return self.drop(h)


@case("inplace_on_view_of_view", vectors(64, 3), rewritten=("drop",))
class OnViewOfView(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        rows = h.transpose(0, 1)
        F.relu_(rows.unsqueeze(0))
        return self.drop(rows)


@case("inplace_functional_relu", rewritten=("drop",))
class FunctionalRelu(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        F.relu(h, inplace=True)
        return self.drop(h)


@case("inplace_dropout_ignored_result", rewritten=(":dropout_1",))
class IgnoredResult(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        F.dropout(h, 0.5, self.training, inplace=True)
        return h


@case("inplace_dropout_seen_by_view", vectors(64, 3), rewritten=(":dropout_1",))
class DropoutSeenByView(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        rows = h.view(-1, 64)
        F.dropout(h, 0.5, self.training, True)
        return rows


@case("inplace_dropout_on_view", vectors(64, 3), optional=(":dropout_1",))
class DropoutOnView(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        F.dropout(h[:, 1:], 0.5, self.training, inplace=True)
        return h


@case("inplace_dropout_on_half_the_units", vectors(64, 3), optional=(":dropout_1",))
class DropoutOnHalf(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        F.dropout(h[..., :32], 0.5, self.training, inplace=True)
        return h


@case("inplace_scale_after", rewritten=("drop",))
class ScaleAfter(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        h = self.drop(h)
        h.mul_(2.0)
        h /= 3.0
        return h


@case("inplace_twice_before", vectors(64, 3), rewritten=("drop",))
class TwiceBefore(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        h.mul_(2.0)
        h.add_(1.0).relu_()
        return self.drop(h)


@case("inplace_twice_after", rewritten=("drop",))
class TwiceAfter(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        h = self.drop(h)
        h.mul_(2.0)
        h.mul_(3.0).tanh_()
        return h


@case("inplace_add_after", rewritten=("drop",))
class AddAfter(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        h = self.drop(h)
        h += 1.0
        return h


@case("inplace_add_before_and_read_later", optional=("drop",))
class AddBefore(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        dropped = self.drop(h)
        h.add_(1.0)
        return dropped + 0.1 * h


@case("inplace_half_after", optional=("drop",))
class HalfAfter(TwoLayers):
    """A view of half the units is overwritten."""

    def between(self, h: Tensor) -> Tensor:
        h = self.drop(h)
        h[:, :32].mul_(0.5)
        h[:, 40:] = 1.0
        return h


@case("inplace_fill_rows", vectors(64, 3), optional=("drop",))
class FillRows(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        h = self.drop(h)
        h[:, 0] = 0.0
        h[:, 1].fill_(2.0)
        return h


@case("inplace_between_two_reads", rewritten=("drop",))
class BetweenTwoReads(TwoLayers):
    """Both reads take the kept units, of two states of the value."""

    def forward(self, x: Tensor) -> Tensor:
        offset = torch.zeros_like(x)
        h = self.lin1(x) + offset
        offset[:, ::2] = 3.0
        return self.lin2(self.drop(h + offset))


@case("inplace_assigned_rows", vectors(64, 3), rewritten=("drop",))
class AssignedRows(TwoLayers):
    """A sequence shifted by one position, as encoder-decoder models do; its first position is a constant."""

    def forward(self, x: Tensor) -> Tensor:
        shifted = x.new_zeros(x.shape)
        shifted[:, 1:] = x[:, :-1].clone()
        shifted[:, 0] = 0.5
        shifted.masked_fill_(shifted > 2, 2.0)
        return self.lin2(self.drop(self.lin1(shifted)))


@case("inplace_halves_before", optional=("drop",))
class HalvesBefore(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        h[:, :32].mul_(2.0)
        h[:, 32:].tanh_()
        return self.drop(h)


@case("inplace_part_of_a_consumers_output", vectors(64, 3), optional=("drop",))
@case("inplace_part_of_a_consumers_output_2d", optional=("drop",))
class PartOfOutput(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.lin2(self.drop(x))
        h.transpose(0, 1)[0].mul_(2.0)
        return h


@case("inplace_masked_fill", vectors(64, 3), rewritten=("drop",))
class MaskedFill(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        h.masked_fill_(torch.arange(3)[:, None] == 1, 0.25)
        return self.drop(h)


@case("inplace_copy", optional=("drop",))
class Copy(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        out = torch.zeros_like(h)
        out.copy_(h)
        out[:, :2].fill_(3.0)
        return self.drop(out)


@case("inplace_out_argument", optional=("drop",))
class OutArgument(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        buffer = torch.empty_like(self.lin2.weight[0])
        torch.add(self.lin2.weight.detach()[0], 1.0, out=buffer)
        return self.drop(h * buffer)


@case("inplace_residual", vectors(64, 3), rewritten=("drop",))
class InplaceResidual(TwoLayers):
    """x += dropout(linear(x)) on a stream that was read before and is read after."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1.0
        before = x.tanh()
        x += self.drop(self.lin1(before))
        return self.lin2(x), x


@case("inplace_residual_alpha", vectors(64, 3), optional=("drop",))
class InplaceResidualAlpha(TwoLayers):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stream = x.clone()
        view = stream[:, 0]
        stream.add_(self.drop(self.lin1(x)), alpha=0.5)
        return self.lin2(stream), view


@case("inplace_input", input_grad=False, rewritten=("drop",))
class InplaceInput(TwoLayers):
    """The caller sees its tensor changed."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return self.lin2(self.drop(F.relu(self.lin1(x))))


@case("inplace_dropout_on_input", input_grad=False, optional=("drop",))
class InplaceDropoutInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.lin = nn.Dropout(0.5, inplace=True), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.drop(x))


@case("inplace_buffer", optional=("drop",))
class InplaceBuffer(TwoLayers):
    """A running mean kept in a buffer, written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(64))

    def between(self, h: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(h.detach().sum(0), alpha=0.1)
        return self.drop(h - self.mean.clone())
