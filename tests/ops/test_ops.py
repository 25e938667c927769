"""Each op against plain indexing, by gradcheck in float64 and by opcheck; registered and eager faces alike."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from dropfx import ops
from dropfx.draws.draw_plan import DrawPlan, draw_number
from dropfx.errors import DoubleBackwardError
from dropfx.patterns import Block, Draw, Pattern, Slice

PATTERNS = [Block(4), Block(8), Block(5), Block(1), Slice()]
"""Whole blocks too short and long enough to copy as rows, ragged blocks, single units, a window."""
FACES = ["registered", "eager"]


def face(op: object, name: str):
    return op if name == "registered" else ops.EAGER[op]


def draw(pattern: Pattern, *units: int, seed: int = 0) -> list[Draw]:
    torch.manual_seed(seed)
    fits = [pattern.fit(n, 0.5) for n in units]
    plan = DrawPlan([f"site{i}" for i in range(len(units))], fits, pattern, torch.device("cpu"))
    return plan.draw(draw_number(plan.device))


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def linear_case(pattern: Pattern, sides: str, seed: int, transposed: bool = False) -> tuple[tuple, Tensor]:
    """Arguments of the gathered Linear and what it must return; `transposed`: the weight lies in memory as [K, N]."""
    n, k = 24, 32
    rows, cols = draw(pattern, n, k, seed=seed)
    x, w, b = leaf(2, 3, cols.width if "cols" in sides else k), leaf(n, k), leaf(n)
    w = w.detach().t().contiguous().t().requires_grad_() if transposed else w
    row_part = (rows.starts, rows.run) if "rows" in sides else (None, 0)
    col_part = (cols.starts, cols.run) if "cols" in sides else (None, 0)
    kept_w = w[rows.units()] if "rows" in sides else w
    kept_w = kept_w[:, cols.units()] if "cols" in sides else kept_w
    expected = 1.5 * (x @ kept_w.T) + (b[rows.units()] if "rows" in sides else b)
    return (x, w, b, *row_part, *col_part, 1.5), expected


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("sides", ["rows", "cols", "rows and cols"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_linear(pattern: Pattern, sides: str, which: str) -> None:
    args, expected = linear_case(pattern, sides, 0)
    function = face(ops.linear_op, which)
    torch.testing.assert_close(function(*args), expected)
    torch.autograd.gradcheck(lambda x, w, b: function(x, w, b, *args[3:]), args[:3])


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("sides", ["rows", "cols", "rows and cols"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_linear_of_a_transposed_weight(pattern: Pattern, sides: str, which: str) -> None:
    args, expected = linear_case(pattern, sides, 0, transposed=True)
    function, w = face(ops.linear_op, which), args[1]
    torch.testing.assert_close(function(*args), expected)
    torch.autograd.gradcheck(lambda x, w, b: function(x, w, b, *args[3:]), args[:3])
    (grad,) = torch.autograd.grad(function(*args).sum(), w)
    assert grad.stride() == w.stride()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_linear_passes_opcheck(pattern: Pattern, transposed: bool) -> None:
    opcheck(ops.linear_op, linear_case(pattern, "rows and cols", 0, transposed)[0])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sides", ["rows", "cols", "rows and cols"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_linear_with_a_weight_gathered_before(pattern: Pattern, sides: str, transposed: bool) -> None:
    args, expected = linear_case(pattern, sides, 0, transposed)
    taken = args[1].detach(), *args[3:7]
    opcheck(ops.gathered_weight_op, taken)
    got = ops.gathered_linear(*args[:2], ops.gathered_weight_op(*taken), *args[2:])
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(y.sin().sum(), args[:3]) for y in (got, expected))
    torch.testing.assert_close(ours, theirs)
    assert ours[1].stride() == args[1].stride()


class Casts(TorchDispatchMode):
    """Notes how many items each cast has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sides", ["rows", "cols", "rows and cols"])
def test_autocast_casts_the_gathered_weight_and_not_the_whole(sides: str) -> None:
    """As eagerly, where the product casts what it reads."""
    found, casts = [], Casts()
    for which in FACES:
        x, w, b, *rest = linear_case(Block(8), sides, 0)[0]
        given = [t.detach().float().requires_grad_() for t in (x, w, b)]
        with casts, torch.autocast("cpu", torch.bfloat16):
            if which == "registered":
                y = ops.gathered_linear(
                    *given[:2], ops.gathered_weight_op(given[1].detach(), *rest[:4]), given[2], *rest
                )
            else:
                y = face(ops.linear_op, which)(*given, *rest)
        assert y.dtype == torch.bfloat16
        found.append([y, *torch.autograd.grad(y.sum(), given)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert casts.sizes
    assert w.numel() not in casts.sizes


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_linear_has_a_second_derivative_when_eager(pattern: Pattern) -> None:
    args, _ = linear_case(pattern, "rows and cols", 0)
    function = face(ops.linear_op, "eager")
    torch.autograd.gradgradcheck(lambda x, w, b: function(x, w, b, *args[3:]), args[:3])


def test_second_derivative_of_the_registered_linear_is_a_named_error() -> None:
    args, _ = linear_case(Block(4), "rows", 0)
    (grad,) = torch.autograd.grad(ops.linear_op(*args).square().sum(), args[0], create_graph=True)
    with pytest.raises(DoubleBackwardError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_linear_computes_only_the_gradients_asked_for(wanted: tuple[bool, ...], which: str) -> None:
    args, expected = linear_case(Block(4), "rows and cols", 0)
    asked = [t for t, w in zip(args[:3], wanted, strict=True) if w]
    frozen = tuple(t if w else t.detach() for t, w in zip(args[:3], wanted, strict=True))
    got = torch.autograd.grad(face(ops.linear_op, which)(*frozen, *args[3:]).sum(), asked)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), asked))


def test_linear_says_when_the_input_does_not_fit() -> None:
    args, _ = linear_case(Block(4), "cols", 0)
    with pytest.raises(RuntimeError, match="kept weight"):
        ops.EAGER[ops.linear_op](leaf(2, 32), *args[1:])


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gather_and_scatter(pattern: Pattern, dim: int, which: str) -> None:
    (kept,) = draw(pattern, 32)
    x = leaf(*((3, 32) if dim == -1 else (32, 3)))
    gather, scatter = face(ops.gather_op, which), face(ops.scatter_op, which)
    torch.testing.assert_close(gather(x, kept.starts, kept.run, dim), x.index_select(dim, kept.units()))
    back = scatter(gather(x, kept.starts, kept.run, dim) * 1.0, kept.starts, kept.run, dim, 32)
    if not kept.fit.ragged:
        keeps = (kept.mask(torch.float64) > 0).to(torch.float64)
        torch.testing.assert_close(back, x * (keeps if dim == -1 else keeps[:, None]))
    torch.autograd.gradcheck(lambda x: gather(x, kept.starts, kept.run, dim), (x,))
    y = leaf(*((3, kept.width) if dim == -1 else (kept.width, 3)))
    torch.autograd.gradcheck(lambda y: scatter(y, kept.starts, kept.run, dim, 32), (y,))
    if which == "registered":
        opcheck(ops.gather_op, (x, kept.starts, kept.run, dim))
        opcheck(ops.scatter_op, (y, kept.starts, kept.run, dim, 32))


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize(
    ("pattern", "base"),
    [
        *((pattern, (4, 3, 32)) for pattern in PATTERNS),
        *((PATTERNS[0], base) for base in ((32,), (1, 32), (3, 1), (5, 4, 3, 32))),
    ],
    ids=str,
)
def test_residual_add(pattern: Pattern, base: tuple[int, ...], which: str) -> None:
    (kept,) = draw(pattern, 32)
    x, y = leaf(*base), leaf(4, 3, kept.width)
    before = x.detach().clone()
    function = face(ops.residual_add_op, which)
    args = (kept.starts, kept.run, -1, 32, 0.5)
    dense = torch.zeros(4, 3, 32, dtype=torch.float64).index_add(-1, kept.units(), y)
    torch.testing.assert_close(function(x, y, *args), x + 0.5 * dense)
    torch.testing.assert_close(x.detach(), before)
    torch.autograd.gradcheck(lambda x, y: function(x, y, *args), (x, y))
    if which == "registered":
        opcheck(ops.residual_add_op, (x, y, *args))


@pytest.mark.parametrize("which", FACES)
@pytest.mark.parametrize("padding", [-1, 2])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_embedding(pattern: Pattern, padding: int, which: str) -> None:
    (kept,) = draw(pattern, 32)
    weight, ids = leaf(7, 32), torch.tensor([[0, 2, 6], [2, 2, 5]])
    args = (ids, weight, kept.starts, kept.run, padding)
    got = face(ops.embedding_op, which)(*args)
    expected = torch.nn.functional.embedding(ids, weight, None if padding < 0 else padding)[..., kept.units()]
    torch.testing.assert_close(got, expected)
    seed = torch.randn_like(got)
    want = torch.autograd.grad(expected, weight, seed)
    torch.testing.assert_close(torch.autograd.grad(got, weight, seed), want)
    if which == "registered":
        opcheck(ops.embedding_op, args)


def test_weight_gradient_is_exactly_zero_at_dropped_places() -> None:
    args, _ = linear_case(Block(4), "rows and cols", 0)
    ops.EAGER[ops.linear_op](*args).sum().backward()
    kept = torch.zeros(24, 32, dtype=torch.bool)
    rows, cols = draw(Block(4), 24, 32)
    kept[rows.units()[:, None], cols.units()] = True
    assert args[1].grad is not None
    assert not args[1].grad[~kept].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", FACES)
def test_autocast_takes_its_own_dtype_and_keeps_gradients_in_the_parameters(which: str, dtype: torch.dtype) -> None:
    (cols,) = draw(Block(4), 32)
    x = torch.randn(6, cols.width, requires_grad=True)
    weight, bias = torch.randn(24, 32, requires_grad=True), torch.randn(24, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = face(ops.linear_op, which)(x, weight, bias, None, 0, cols.starts, cols.run, 1.0)
        expected = torch.nn.functional.linear(x, weight[:, cols.units()], bias)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.float32,) * 3
