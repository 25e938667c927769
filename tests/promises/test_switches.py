"""Promise 5: training flags and rates of dropout modules take effect at the next call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dropfx
from dropfx.draws.runtime import shared
from tests.catalogue import CASES
from tests.catalogue.case import check_step, compiled_run, mlp, pair
from tests.oracle import comparison
from tests.promises.switching import check, dropped_share, example

PATTERNS = ("block", "slice")


@pytest.fixture(params=PATTERNS)
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """The original and the compiled MLP with the sites "2" and "5", traced once."""
    models = pair(CASES["mlp"], torch.float64, pattern=request.param)
    check(models)
    return models


def test_train_and_eval(models: tuple[nn.Module, nn.Module]) -> None:
    for training in (False, True, False, True):
        for model in models:
            model.train(training)
        assert set(check(models)) == ({"2", "5"} if training else set())


@pytest.mark.parametrize("site", ["2", "5"])
def test_one_dropout_switched_off(models: tuple[nn.Module, nn.Module], site: str) -> None:
    for model in models:
        model.get_submodule(site).eval()
    assert set(check(models)) == {"2", "5"} - {site}
    for model in models:
        model.train()
    assert set(check(models)) == {"2", "5"}


@pytest.mark.parametrize("site", ["2", "5"])
def test_monte_carlo_dropout(models: tuple[nn.Module, nn.Module], site: str) -> None:
    """`model.eval()`, then one dropout back in training."""
    for model in models:
        model.eval()
        model.get_submodule(site).train()
    for seed in range(3):
        assert set(check(models, seed)) == {site}
    with torch.no_grad():
        assert not torch.equal(models[1](example()), models[1](example()))


def test_monte_carlo_dropout_leaves_the_rest_in_eval() -> None:
    """Batch norm uses its running statistics and does not update them."""
    case = CASES["batch_norm_before"]
    original, compiled = pair(case, torch.float64)
    args, _ = case.call(4, torch.float64)
    for model in (original, compiled):
        model.eval()
        model[3].train()
    assert set(check_step(original, compiled, args, dtype=torch.float64)) == {"3"}
    assert compiled[1].num_batches_tracked == 0


def test_monte_carlo_dropout_without_a_training_call_before() -> None:
    original, compiled = pair(CASES["mlp"], torch.float64)
    for model in (original, compiled):
        model.eval()
        model[2].train()
    assert set(check((original, compiled))) == {"2"}


def test_other_modules_switched_alone() -> None:
    """A batch norm in eval while the model trains."""
    case = CASES["batch_norm_before"]
    original, compiled = pair(case, torch.float64)
    args, _ = case.call(4, torch.float64)
    for frozen in (False, True, False):
        for model in (original, compiled):
            model[1].train(not frozen)
        check_step(original, compiled, args, dtype=torch.float64)


def test_root_flag_alone(models: tuple[nn.Module, nn.Module]) -> None:
    """`model.training = False` by hand switches no child."""
    for model in models:
        model.training = False
    assert set(check(models)) == {"2", "5"}


@pytest.mark.parametrize("p", [0.25, 0.75, 0.9, 0.0, 1.0])
def test_changed_rate(models: tuple[nn.Module, nn.Module], p: float) -> None:
    for model in models:
        model[2].p = p
    masks = check(models)
    if p == 0.0:
        assert set(masks) == {"5"}
    elif p < 1.0:
        assert set(masks) == {"2", "5"}
        assert abs(dropped_share(masks["2"]) - p) <= 0.02
        assert abs(dropped_share(masks["5"]) - 0.3) <= 0.02
    for model in models:
        model[2].p = 0.5
    assert dropped_share(check(models)["2"]) == 0.5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rate_of_zero_is_identity(pattern: str) -> None:
    compiled = dropfx.compile(mlp(64, 96, 8, p=0.0).double(), pattern=pattern, min_speedup=0)
    y = compiled(example())
    want = compiled[3](compiled[1](compiled[0](example())))
    assert not comparison.difference(y.detach(), want.detach(), 1e-10, 0.0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rate_of_one_is_zeros(pattern: str) -> None:
    compiled = dropfx.compile(mlp(64, 96, 8, p=1.0).double(), pattern=pattern, min_speedup=0)
    outcome, _ = compiled_run(compiled, (example(),))
    assert torch.equal(outcome.outputs[""], compiled[3].bias.detach().expand(4, 8))
    assert not outcome.grads["3.weight"].any()
    assert not outcome.grads["0.weight"].any()
    assert not outcome.input_grads["[0][0]"].any()


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_leaving_an_end_of_the_range(start: float) -> None:
    original, compiled = (model.double() for model in (mlp(64, 96, 8), mlp(64, 96, 8)))
    compiled.load_state_dict(original.state_dict())
    dropfx.compile(compiled, min_speedup=0)
    for p in (start, 0.5, start):
        for model in (original, compiled):
            model[2].p = p
        masks = check((original, compiled))
        if p == 0.5:
            assert dropped_share(masks["2"]) == 0.5


def test_rate_schedule_does_not_retrace(models: tuple[nn.Module, nn.Module]) -> None:
    traces = shared.rewritten
    for step in range(20):
        p = 0.1 + 0.04 * step
        for model in models:
            model[2].p = p
        assert abs(dropped_share(check(models, step)["2"]) - p) <= 0.02
    assert shared.rewritten <= traces + 1  # the rate is an input from its first change on


def test_steps_and_batch_sizes_do_not_retrace(models: tuple[nn.Module, nn.Module]) -> None:
    traces = shared.rewritten
    for step, batch in enumerate((4, 7, 2, 4, 32, 7)):
        check_step(*models, (example(batch),), dtype=torch.float64, seed=step)
    assert shared.rewritten <= traces + 1  # the batch size is an input from its first change on


def test_tiny_batches_retrace_at_most_once(models: tuple[nn.Module, nn.Module]) -> None:
    for batch in (0, 1):
        check_step(*models, (example(batch),), dtype=torch.float64)
    traces = shared.rewritten
    for batch in (1, 4, 0, 4, 1, 0):
        check_step(*models, (example(batch),), dtype=torch.float64)
    assert shared.rewritten == traces


def test_alternating_calls_do_not_retrace() -> None:
    """Specialisations are kept: with and without a mask, with gradients and without."""
    case = CASES["argument_given"]
    _, compiled = pair(case)
    (x, mask), _ = case.call(4)

    def both() -> None:
        compiled(x, mask)
        compiled(x)
        with torch.no_grad():
            compiled(x)
        compiled.eval()(x)
        compiled.train()

    both()
    traces = shared.rewritten
    both()
    both()
    assert shared.rewritten == traces
