"""`patterns.search`: the exact distribution of periods, the paper's search, and what is refused."""

import math

import pytest
import torch
from torch import Tensor

from dropfx.errors import DropfxError
from dropfx.patterns import search

GRID = [
    (rate * (n - 1) / n, n)
    for n in (2, 3, 4, 8, 16, 100)
    for rate in (1e-9, 1e-4, 0.05, 0.3, 0.5, 0.7, 0.95, 1 - 1e-4, 1 - 1e-9)
]


def shares(n: int) -> Tensor:
    """What the periods 1..n drop."""
    periods = torch.arange(1, n + 1, dtype=torch.float64)
    return (periods - 1) / periods


def rate_of(d: Tensor) -> float:
    return math.fsum((d * shares(len(d))).tolist())


def entropy(d: Tensor) -> float:
    return -float(torch.special.xlogy(d, d).sum())


def random_feasible(rate: float, n: int, generator: torch.Generator) -> Tensor:
    """A distribution of that rate: one that drops less and one that drops more, mixed so that the rate is met."""
    low, high = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    low[0] = high[-1] = 1.0
    # a power of uniform numbers: sparse distributions come up as well as even ones
    d = torch.rand(n, generator=generator, dtype=torch.float64) ** float(torch.randint(1, 9, (1,), generator=generator))
    d /= d.sum()
    other = low if rate_of(d) > rate else high
    mix = (rate - rate_of(other)) / (rate_of(d) - rate_of(other))
    return mix * d + (1 - mix) * other


def by_newton(rate: float, n: int) -> Tensor:
    """max H(d) for sum d = 1 and d . shares = rate: Newton on the stationarity conditions, in d and both multipliers.

    Knows nothing of the solution's exponential form.
    """
    start = min(rate / shares(n)[-1].item(), 1 - 1e-3)
    d = torch.full((n,), 1e-3, dtype=torch.float64)
    d[0] += 1 - start
    d[-1] += start
    d /= d.sum()
    a = torch.stack([torch.ones(n, dtype=torch.float64), shares(n)])
    wanted = torch.tensor([1.0, rate], dtype=torch.float64)
    multipliers = torch.zeros(2, dtype=torch.float64)
    for _ in range(200):
        gradient = d.log() + 1 - a.T @ multipliers
        gap = a @ d - wanted
        # the Hessian diag(1/d) makes the system 2 x 2
        change = torch.linalg.solve(a @ (d[:, None] * a.T), a @ (d * gradient) - gap)
        step = d * (a.T @ change - gradient)
        size = min(1.0, 0.9 / max(float((-step / d).max()), 1e-300))  # stays positive
        d, multipliers = d + size * step, multipliers + size * change
        if size == 1.0 and float(step.abs().max()) < 1e-15:
            break
    return d


# -- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "n"), GRID)
def test_exact_is_a_distribution_that_meets_the_rate(rate: float, n: int) -> None:
    d = search(rate, n)
    assert d.dtype == torch.float64
    assert d.shape == (n,)
    assert (d >= 0).all()
    assert math.fsum(d.tolist()) == pytest.approx(1.0, abs=1e-12)
    assert rate_of(d) == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("method", ["exact", "sgd"])
def test_limits_are_one_hot(n: int, method: str) -> None:
    assert search(0.0, n, method=method).tolist() == [1.0] + [0.0] * (n - 1)
    assert search((n - 1) / n, n, method=method).tolist() == [0.0] * (n - 1) + [1.0]


@pytest.mark.parametrize("n", [2, 4, 16])
def test_approaches_the_limits(n: int) -> None:
    assert search(1e-9, n)[0] == pytest.approx(1.0, abs=1e-7)
    assert search((n - 1) / n - 1e-9, n)[-1] == pytest.approx(1.0, abs=1e-5)


def test_the_mean_of_all_periods_gives_the_uniform_distribution() -> None:
    rate = rate_of(torch.full((5,), 0.2, dtype=torch.float64))
    assert search(rate, 5).tolist() == pytest.approx([0.2] * 5, abs=1e-12)


def test_two_periods_leave_no_choice() -> None:
    assert search(0.3, 2).tolist() == pytest.approx([0.4, 0.6], abs=1e-12)


@pytest.mark.parametrize(("rate", "first"), [(0.3, 0.515), (0.5, 0.221), (0.7, 0.002)])
def test_known_shares_of_period_one(rate: float, first: float) -> None:
    assert search(rate, 4)[0].item() == pytest.approx(first, abs=5e-4)


@pytest.mark.parametrize("n", [3, 4, 16])
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.62])
def test_no_random_feasible_distribution_has_more_entropy(rate: float, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    most = entropy(search(rate, n))
    for _ in range(300):
        d = random_feasible(rate, n, generator)
        assert d.min() >= 0
        assert rate_of(d) == pytest.approx(rate, abs=1e-12)
        assert entropy(d) <= most + 1e-12


@pytest.mark.parametrize("n", [3, 4, 16])
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.62])
def test_no_step_along_the_constraints_gains_entropy(rate: float, n: int) -> None:
    """Moves that keep the sum and the rate: the largest entropy is at d, not only near it among random points."""
    d = search(rate, n)
    a = torch.stack([torch.ones(n, dtype=torch.float64), shares(n)])
    free = torch.linalg.svd(a).Vh[2:]
    for direction in (*free, *-free):
        for size in (1e-3, 1e-2, 0.1, 0.5):
            moved = d + size * float((d / direction.abs()).min()) * direction
            assert moved.min() >= 0
            assert entropy(moved) < entropy(d) + 1e-15


@pytest.mark.parametrize("n", [2, 3, 4, 16])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.45])
def test_exact_is_the_constrained_optimum(rate: float, n: int) -> None:
    optimum = by_newton(rate, n)
    assert rate_of(optimum) == pytest.approx(rate, abs=1e-12)
    assert search(rate, n).tolist() == pytest.approx(optimum.tolist(), abs=1e-9)


# -- the paper's search ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "reached"), [(0.3, 0.3023), (0.7, 0.6918)])
def test_sgd_reaches_the_optimum_of_its_soft_loss(rate: float, reached: float) -> None:
    assert rate_of(search(rate, 4, method="sgd")) == pytest.approx(reached, abs=1e-4)


@pytest.mark.parametrize(("rate", "n"), [(0.2, 8), (0.4, 3), (0.6, 4)])
def test_sgd_is_near_exact(rate: float, n: int) -> None:
    soft, hard = search(rate, n, method="sgd"), search(rate, n)
    assert math.fsum(soft.tolist()) == pytest.approx(1.0, abs=1e-12)
    assert abs(rate_of(soft) - rate) < 0.02
    assert (soft - hard).abs().max() < 0.05
    # the optimum of the soft loss has the largest entropy at the rate that it reaches; gradient steps come near it
    assert soft.tolist() == pytest.approx(search(rate_of(soft), n).tolist(), abs=5e-4)


def test_sgd_gives_the_rate_away_for_entropy() -> None:
    soft, hard = search(0.7, 4, method="sgd"), search(0.7, 4)
    assert rate_of(soft) < 0.7
    assert entropy(soft) > entropy(hard)


@pytest.mark.parametrize("method", ["exact", "sgd"])
def test_no_generator_is_moved(method: str) -> None:
    before = torch.get_rng_state()
    assert torch.equal(search(0.4, 5, method=method), search(0.4, 5, method=method))
    assert torch.equal(torch.get_rng_state(), before)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "n", "method", "words"),
    [
        (0.51, 2, "exact", "rate: got 0.51, but periods up to max_period=2 drop at most 0.5 of the units"),
        (0.75000001, 4, "sgd", "max_period=4 drop at most 0.75"),
        (0.1, 1, "exact", "max_period=1 drop at most 0 of"),
        (0.3, 0, "exact", r"max_period: got 0, accepted are integers >= 1"),
        (0.3, -3, "exact", "max_period: got -3"),
        (0.3, 4.0, "exact", "max_period: got 4.0"),
        (0.3, True, "exact", "max_period: got True"),
        (1.0, 4, "exact", r"rate: got 1.0, accepted are numbers in \[0, 1\)"),
        (-0.1, 4, "exact", "rate: got -0.1"),
        (True, 4, "exact", "rate: got True"),
        (math.nan, 4, "exact", "rate: got nan"),
        (math.inf, 4, "exact", "rate: got inf"),
        ("0.3", 4, "exact", "rate: got '0.3'"),
        (None, 4, "exact", "rate: got None"),
        (0.3, 4, "adam", "method: got 'adam', accepted are 'exact' and 'sgd'"),
        (0.3, 4, None, "method: got None"),
    ],
)
def test_bad_input(rate: object, n: object, method: object, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        search(rate, n, method=method)  # type: ignore[arg-type]
    assert isinstance(caught.value, DropfxError)
