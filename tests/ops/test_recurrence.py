"""The recurrences of LSTM, GRU and RNN against torch.nn's own layers, and the products that they are made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dropfx import ops
from dropfx.errors import DoubleBackwardError
from dropfx.ops.recurrent import product
from dropfx.ops.recurrent.recurrence import recurrence_backward_op

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
FACES = ("registered", "eager")
LENGTHS, SHORT = torch.tensor([7, 5, 5, 2]), torch.tensor([3, 2, 1])


def face(name: str) -> Callable[..., Any]:
    return ops.recurrence_op if name == "registered" else ops.EAGER[ops.recurrence_op]


class Case(NamedTuple):
    """A layer of torch.nn and what it runs on; the direction tested is the reverse one where it has two."""

    layer: nn.RNNBase
    x: Tensor | PackedSequence
    states: list[Tensor]  # [directions, B, *]

    @property
    def kind(self) -> str:
        return self.layer.mode.lower()

    @property
    def reverse(self) -> bool:
        return self.layer.bidirectional

    def weight(self, name: str) -> Tensor | None:
        return getattr(self.layer, f"{name}_l0{'_reverse' if self.reverse else ''}", None)

    def theirs(self) -> list[Tensor]:
        """Output, last h and last c by torch.nn, of the direction tested."""
        out, last = self.layer(self.x, tuple(self.states) if self.kind == "lstm" else self.states[0])
        out = out.data if isinstance(out, PackedSequence) else out
        last = list(last) if self.kind == "lstm" else [last]
        return [out[..., -last[0].size(-1) :], *(part[-1] for part in last)]

    def arguments(self) -> tuple[Any, ...]:
        """Of the op."""
        gru = self.kind == "gru"
        bias, b_hh = self.weight("bias_ih"), self.weight("bias_hh")
        data, sizes = (self.x.data, self.x.batch_sizes) if isinstance(self.x, PackedSequence) else (self.x, None)
        pre = nn.functional.linear(data, self.weight("weight_ih"), bias if gru or bias is None else bias + b_hh)
        h0, c0 = (*(state[-1] for state in self.states), None)[:2]
        return self.kind, pre, h0, c0, self.weight("weight_hh"), b_hh if gru else None, self.weight("weight_hr"), sizes

    def ours(self, which: str) -> list[Tensor]:
        return list(face(which)(*self.arguments(), self.reverse)[: 1 + len(self.states)])

    def leaves(self) -> list[Tensor]:
        """Where a gradient of the direction tested arrives."""
        weights = [p for name, p in self.layer.named_parameters() if name.endswith("_reverse") == self.reverse]
        x = self.x.data if isinstance(self.x, PackedSequence) else self.x
        return [x, *self.states, *weights]


def make(
    kind: str,
    *,
    reverse: bool = False,
    proj: int = 0,
    bias: bool = True,
    lengths: Tensor | None = None,
    sizes: tuple[int, int, int, int] = (7, 4, 5, 6),
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Sizes: steps, sequences, inputs, units."""
    torch.manual_seed(0)
    steps, batch, inputs, units = sizes
    given = {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {"proj_size": proj} if proj else {}
    cls: Any = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.RNN)
    layer = cls(inputs, units, bias=bias, bidirectional=reverse, **given).to(dtype)
    x: Any = torch.randn(steps, batch, inputs, dtype=dtype)
    x = x if lengths is None else pack_padded_sequence(x, lengths)
    x = x._replace(data=x.data.requires_grad_()) if lengths is not None else x.requires_grad_()
    widths = [proj or units, units] if kind == "lstm" else [units]
    states = [torch.randn(1 + reverse, batch, width, dtype=dtype).requires_grad_() for width in widths]
    return Case(layer, x, states)


def assert_same(case: Case, which: str, read: tuple[int, ...] = (0, 1, 2), **tolerance: float) -> None:
    """Values, and all gradients where the outputs `read` are."""
    ours, theirs = case.ours(which), case.theirs()
    torch.testing.assert_close(ours, theirs, **tolerance)
    places = [place for place in read if place < len(ours)]
    cotangents = [torch.randn_like(ours[place]) for place in places]
    got, want = (
        torch.autograd.grad([made[place] for place in places], case.leaves(), cotangents, allow_unused=True)
        for made in (ours, theirs)
    )
    for one, other, leaf in zip(got, want, case.leaves(), strict=True):
        torch.testing.assert_close(*(torch.zeros_like(leaf) if g is None else g for g in (one, other)), **tolerance)


# -- against torch.nn -----------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "reverse": {"reverse": True},
    "packed": {"lengths": LENGTHS},
    "packed reverse": {"lengths": LENGTHS, "reverse": True},
    "no bias": {"bias": False},
    "one step": {"sizes": (1, 4, 5, 6)},
    "one sequence": {"sizes": (7, 1, 5, 6), "reverse": True},
    "one unit": {"sizes": (7, 4, 1, 1)},
}
PROJECTED = [{**given, "proj": proj} for given in VARIANTS.values() for proj in (3,) if "sizes" not in given]


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_nn(kind: str, variant: str, which: str) -> None:
    assert_same(make(kind, **VARIANTS[variant]), which)


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("given", PROJECTED, ids=str)
def test_projected_lstm_equals_torch_nn(given: dict[str, Any], which: str) -> None:
    assert_same(make("lstm", **given), which)


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("read", [(0,), (1,), (2,), (1, 2)])
@pytest.mark.parametrize("given", [{}, {"lengths": LENGTHS, "reverse": True}, {"proj": 3}], ids=str)
def test_results_that_are_not_read(given: dict[str, Any], read: tuple[int, ...], which: str) -> None:
    assert_same(make("lstm", **given), which, read)


@pytest.mark.parametrize("which", FACES)
def test_reversed_sequences_begin_at_their_own_ends(which: str) -> None:
    """The state of a packed sequence rests until its last step is visited."""
    case = make("gru", lengths=LENGTHS, reverse=True)
    packed = PackedSequence(case.ours(which)[0], case.x.batch_sizes)
    padded, lengths = pad_packed_sequence(packed)
    assert lengths.tolist() == LENGTHS.tolist()
    inputs, _ = pad_packed_sequence(case.x)
    for place, length in enumerate(LENGTHS.tolist()):
        alone = Case(case.layer, inputs[:length, place : place + 1], [s[:, place : place + 1] for s in case.states])
        out, last = alone.ours(which)
        torch.testing.assert_close(padded[:length, place : place + 1], out)
        torch.testing.assert_close(case.ours(which)[1][place : place + 1], last)


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("given", [{}, {"reverse": True, "lengths": torch.tensor([12, 11, 11, 9, 3])}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_by_packed_weights(kind: str, given: dict[str, Any], which: str) -> None:
    """A weight so large that the product packs it."""
    case = make(kind, sizes=(12, 5, 30, 520), dtype=torch.float32, **given)
    assert product._pays(case.weight("weight_hh"), 12)
    assert_same(case, which, rtol=1e-4, atol=2e-5)


def test_projection_by_packed_weights() -> None:
    case = make("lstm", sizes=(12, 5, 30, 520), proj=136, dtype=torch.float32)
    assert product._pays(case.weight("weight_hh"), 12)
    assert_same(case, "eager", rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, which: str) -> None:
    single = make(kind, dtype=torch.float32)
    case = make(kind, dtype=torch.bfloat16)
    with torch.no_grad():
        for half, whole in zip(case.leaves(), single.leaves(), strict=True):
            whole.copy_(half)

    def values(one: Case) -> list[Tensor]:
        made = one.ours(which)
        total = sum(part.float().sum() for part in made)
        return [*(part.detach() for part in made), *torch.autograd.grad(total, one.leaves())]

    for half, whole in zip(values(case), values(single), strict=True):
        assert half.dtype is torch.bfloat16
        torch.testing.assert_close(half.float(), whole, rtol=5e-2, atol=5e-2 * float(whole.abs().max()))


@pytest.mark.parametrize("which", FACES)
def test_dtype_is_that_of_the_gates(which: str) -> None:
    """Under autocast a Linear gives them in half precision, weights and states come as they are."""
    case = make("lstm", dtype=torch.float32)
    kind, pre, *rest = case.arguments()
    out, h, c, *_ = face(which)(kind, pre.bfloat16(), *rest, False)
    assert {out.dtype, h.dtype, c.dtype} == {torch.bfloat16}
    grads = torch.autograd.grad(out.float().sum() + c.float().sum(), case.leaves())
    assert {grad.dtype for grad in grads} == {torch.float32}


@pytest.mark.parametrize("which", FACES)
def test_states_and_gates_of_the_caller_stay(which: str) -> None:
    case = make("lstm")
    arguments = case.arguments()
    before = [t.detach().clone() for t in arguments if isinstance(t, Tensor)]
    out, h, c, *_ = face(which)(*arguments, False)
    (out.sum() + h.sum() + c.sum()).backward()
    after = [t.detach() for t in arguments if isinstance(t, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(out.data_ptr() != t.data_ptr() and h.data_ptr() != t.data_ptr() for t in after)


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("kind", KINDS)
def test_operands_in_any_layout(kind: str, which: str) -> None:
    """Gates transposed as batch_first gives them, states selected, a weight that is a transposed view."""
    case = make(kind)
    name, pre, h0, c0, w_hh, *rest = case.arguments()
    expected = face(which)(name, pre, h0, c0, w_hh, *rest, False)

    def turned(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.transpose(0, 1).contiguous().transpose(0, 1)

    made = face(which)(name, turned(pre), turned(h0), turned(c0), turned(w_hh), *rest, False)
    torch.testing.assert_close(made[:2], expected[:2])
    weights = torch.randn_like(made[0])
    got, want = (
        torch.autograd.grad((v[0] * weights).sum(), case.leaves(), retain_graph=True) for v in (made, expected)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_each_time(kind: str) -> None:
    case = make(kind, sizes=(12, 5, 30, 520), dtype=torch.float32)
    runs = []
    for _ in range(2):
        made = case.ours("eager")
        runs.append([*made, *torch.autograd.grad(sum(p.sum() for p in made), case.leaves())])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# -- derivatives ----------------------------------------------------------------------------------------------------


def tensors_of(case: Case) -> tuple[list[Tensor], Callable[..., tuple[Any, ...]]]:
    """The tensors of the op's arguments as leaves, and the arguments made of them."""
    kind, *operands, sizes = case.arguments()
    places = [place for place, operand in enumerate(operands) if operand is not None]
    leaves = [operands[place].detach().requires_grad_() for place in places]

    def arguments(*tensors: Tensor) -> tuple[Any, ...]:
        given = dict(zip(places, tensors, strict=True))
        return (kind, *(given.get(place) for place in range(len(operands))), sizes, case.reverse)

    return leaves, arguments


GRADCHECKED = [
    *itertools.product(KINDS, [{}, {"lengths": SHORT, "reverse": True}]),
    ("lstm", {"proj": 2}),
    ("lstm", {"proj": 2, "lengths": SHORT, "reverse": True}),
]


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize(("kind", "given"), GRADCHECKED, ids=str)
def test_gradcheck(kind: str, given: dict[str, Any], which: str) -> None:
    case = make(kind, sizes=(3, 3, 2, 3), **given)
    leaves, arguments = tensors_of(case)
    torch.autograd.gradcheck(lambda *t: face(which)(*arguments(*t))[: 1 + len(case.states)], leaves)


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize(
    ("kind", "proj", "wanted"),
    [*(("lstm", 3, place) for place in range(5)), *(("gru", 0, place) for place in range(4))],
)
def test_only_the_gradients_asked_for(kind: str, proj: int, wanted: int, which: str) -> None:
    leaves, arguments = tensors_of(make(kind, proj=proj))
    whole = torch.autograd.grad(face(which)(*arguments(*leaves))[0].sum(), leaves)
    frozen = [leaf if place == wanted else leaf.detach() for place, leaf in enumerate(leaves)]
    (got,) = torch.autograd.grad(face(which)(*arguments(*frozen))[0].sum(), [leaves[wanted]])
    torch.testing.assert_close(got, whole[wanted])


@pytest.mark.parametrize("place", range(6))
def test_backward_op_returns_what_the_mask_asks_for(place: int) -> None:
    case = make("lstm", proj=3)
    kind, pre, h0, c0, w_hh, b_hh, w_hr, sizes = case.arguments()
    out, _, _, *saved = ops.recurrence_op(kind, pre, h0, c0, w_hh, b_hh, w_hr, sizes, False)
    mask = [index == place for index in range(6)]
    weights = (w_hh, b_hh, w_hr, sizes, False, None, 0, None, 0, mask)
    made = recurrence_backward_op(kind, torch.ones_like(out), None, None, *saved, h0, c0, *weights)
    assert len(made) == 1
    operand = (pre, h0, c0, w_hh, w_hh[:, 0], w_hr)[place]
    assert made[0].numel() == operand.numel()


def differentiate_twice(out: Tensor, x: Tensor) -> None:
    (grad,) = torch.autograd.grad(out.square().sum(), [x], create_graph=True)
    grad.sum().backward()


@pytest.mark.parametrize("which", FACES)
def test_second_derivative_is_a_named_error(which: str) -> None:
    case = make("lstm")
    with pytest.raises(DoubleBackwardError, match="second derivative"):
        differentiate_twice(case.ours(which)[0], case.x)


@pytest.mark.parametrize("which", FACES)
def test_no_gradient_is_asked_of_anything(which: str) -> None:
    case = make("gru")
    with torch.no_grad():
        made = case.ours(which)
    assert not any(part.requires_grad for part in made)
    torch.testing.assert_close(made, case.theirs())


# -- for compilers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "given"), [*GRADCHECKED, ("lstm", {"dtype": torch.float32})], ids=str)
def test_passes_opcheck(kind: str, given: dict[str, Any]) -> None:
    leaves, arguments = tensors_of(make(kind, **{"sizes": (3, 3, 2, 3), **given}))
    opcheck(ops.recurrence_op, arguments(*leaves))


def as_written(case: Case, batch_first: bool = False, grad_mode: bool = True) -> tuple[Any, ...]:
    x, sizes = (case.x.data, case.x.batch_sizes) if isinstance(case.x, PackedSequence) else (case.x, None)
    x = x.detach().transpose(0, 1).contiguous() if batch_first else x.detach()
    weights = [w.detach().requires_grad_() for w in case.layer._flat_weights]
    states = [state.detach().requires_grad_() for state in case.states]
    options = (case.layer.bias, 1, case.reverse, batch_first, grad_mode)
    return case.kind, x.requires_grad_(), sizes, states, weights, *options


@pytest.mark.parametrize("given", [{}, {"reverse": True}, {"lengths": LENGTHS}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_as_written_equals_torch_nn(kind: str, given: dict[str, Any]) -> None:
    case = make(kind, **given)
    arguments = as_written(case)
    out, last = case.layer(case.x, tuple(case.states) if kind == "lstm" else case.states[0])
    theirs = [out.data if isinstance(out, PackedSequence) else out, *(last if kind == "lstm" else [last])]
    ours = ops.recurrent_as_written_op(*arguments)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    leaves = [arguments[1], *arguments[3], *arguments[4]]
    want = torch.autograd.grad(
        sum(p.sum() for p in theirs), [case.leaves()[0], *case.states, *case.layer._flat_weights]
    )
    torch.testing.assert_close(torch.autograd.grad(sum(p.sum() for p in ours), leaves), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [{}, {"reverse": True, "bias": False}, {"lengths": LENGTHS}], ids=str)
def test_as_written_passes_opcheck(kind: str, given: dict[str, Any]) -> None:
    opcheck(ops.recurrent_as_written_op, as_written(make(kind, **given)))


def test_as_written_batch_first_and_projected() -> None:
    case = make("lstm", proj=3, reverse=True)
    opcheck(ops.recurrent_as_written_op, as_written(case, batch_first=True))
    out, _ = case.layer(case.x, tuple(case.states))
    torch.testing.assert_close(ops.recurrent_as_written_op(*as_written(case, batch_first=True))[0], out.transpose(0, 1))


def test_second_derivative_of_as_written_is_a_named_error() -> None:
    arguments = as_written(make("gru"))
    with pytest.raises(DoubleBackwardError, match="second derivative"):
        differentiate_twice(ops.recurrent_as_written_op(*arguments)[0], arguments[1])


# -- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_packed_product_equals_the_plain_one(turned: bool, rows: int) -> None:
    """Of fewer rows too than it was packed for, as packed sequences have them towards their ends."""
    torch.manual_seed(0)
    weight = torch.randn(640, 512)
    weight = torch.randn(512, 640).t() if turned else weight
    x, y = torch.randn(rows, 512), torch.randn(rows, 640)
    assert product._pays(weight, 8)
    before = y.clone()
    torch.testing.assert_close(product.product_with(weight, 8, 8)(x, y), x @ weight.t() + y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product.product_with(weight, 8, 1)(x, y), x @ weight.t() + y)
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(640, 512, dtype=torch.float64), torch.zeros(640, 512, dtype=torch.bfloat16), torch.zeros(64, 512)],
    ids=["float64", "bfloat16", "small"],
)
def test_what_is_not_packed(weight: Tensor) -> None:
    assert not product._pays(weight, 35)


def test_few_steps_are_not_worth_packing() -> None:
    assert not product._pays(torch.zeros(640, 512), 7)


def test_one_buffer() -> None:
    weights = [torch.randn(3, 4).t(), torch.randn(5), torch.randn(2, 2, requires_grad=True)]
    made = ops.in_one_buffer(weights)
    assert all(torch.equal(one, other) for one, other in zip(made, weights, strict=True))
    assert len({part.untyped_storage().data_ptr() for part in made}) == 1
    assert [part.storage_offset() for part in made] == [0, 12, 17]
    made[2].sum().backward()
    assert torch.equal(weights[2].grad, torch.ones(2, 2))
