"""Promise 5: live switches. Training flags, rates and attributes take effect at the next call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropfx
from tests import oracle
from tests.case import check_step, compiled_run, mlp, pair, recording
from tests.models import CASES

PATTERNS = ("block", "slice")


@pytest.fixture(params=PATTERNS)
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """The original and the compiled MLP with the sites "2" and "5", traced once."""
    models = pair(CASES["mlp"], torch.float64, pattern=request.param)
    check(models)
    return models


def example(batch: int = 4, seed: int = 0) -> Tensor:
    return CASES["mlp"].call(batch, torch.float64, seed)[0][0]


def check(models: tuple[nn.Module, nn.Module], seed: int = 0) -> oracle.Masks:
    """Promise 2 for one step, and the masks of the sites that dropped anything."""
    masks = check_step(*models, (example(),), dtype=torch.float64, seed=seed)
    return {name: mask for name, mask in masks.items() if not (mask == 1).all()}


def dropped_share(mask: Tensor) -> float:
    return float((mask == 0).double().mean())


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
    assert not oracle.difference(y.detach(), want.detach(), 1e-10, 0.0)


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
    traces = dropfx.compiler.trace_count()
    for step in range(20):
        p = 0.1 + 0.04 * step
        for model in models:
            model[2].p = p
        assert abs(dropped_share(check(models, step)["2"]) - p) <= 0.02
    assert dropfx.compiler.trace_count() == traces


def test_steps_and_batch_sizes_do_not_retrace(models: tuple[nn.Module, nn.Module]) -> None:
    traces = dropfx.compiler.trace_count()
    for step, batch in enumerate((4, 7, 2, 4, 32, 7)):
        check_step(*models, (example(batch),), dtype=torch.float64, seed=step)
    assert dropfx.compiler.trace_count() == traces


def test_tiny_batches_retrace_at_most_once(models: tuple[nn.Module, nn.Module]) -> None:
    for batch in (0, 1):
        check_step(*models, (example(batch),), dtype=torch.float64)
    traces = dropfx.compiler.trace_count()
    for batch in (1, 4, 0, 4, 1, 0):
        check_step(*models, (example(batch),), dtype=torch.float64)
    assert dropfx.compiler.trace_count() == traces


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
    traces = dropfx.compiler.trace_count()
    both()
    both()
    assert dropfx.compiler.trace_count() == traces


# Functional dropouts and plain attributes


class Scheduled(nn.Module):
    """`F.dropout` with rates that are read from attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.lin2, self.lin3 = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 8)
        self.p, self.rates, self.factor, self.residual, self.live = 0.5, {"hidden": 0.25}, 1.0, False, True

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.tanh(self.lin1(x)), self.p, self.training)
        hidden = self.rates["hidden"] * self.factor
        z = F.dropout(torch.tanh(self.lin2(h)), p=hidden, training=self.training and self.live)
        return self.lin3(h + z if self.residual else z)


@pytest.fixture
def scheduled() -> tuple[nn.Module, nn.Module]:
    original, compiled = Scheduled().double(), Scheduled().double()
    compiled.load_state_dict(original.state_dict())
    models = original, dropfx.compile(compiled, min_speedup=0)
    assert set(check(models)) == {":dropout_1", ":dropout_2"}
    return models


def shares(masks: oracle.Masks) -> list[float]:
    return [round(dropped_share(masks[name]), 6) for name in (":dropout_1", ":dropout_2")]


def test_functional_rate(scheduled: tuple[nn.Module, nn.Module]) -> None:
    for p in (0.25, 0.75, 0.5):
        for model in scheduled:
            model.p = p
        assert shares(check(scheduled)) == [p, 0.25]


def test_functional_rate_schedule_does_not_retrace(scheduled: tuple[nn.Module, nn.Module]) -> None:
    traces = dropfx.compiler.trace_count()
    for step in range(10):
        for model in scheduled:
            model.p = 0.1 + 0.05 * step
        check(scheduled, step)
    assert dropfx.compiler.trace_count() == traces


def test_functional_rate_computed(scheduled: tuple[nn.Module, nn.Module]) -> None:
    for model in scheduled:
        model.factor = 2.0
    assert shares(check(scheduled)) == [0.5, 0.5]


def test_functional_rate_in_a_container(scheduled: tuple[nn.Module, nn.Module]) -> None:
    for model in scheduled:
        model.rates["hidden"] = 0.75
    assert shares(check(scheduled)) == [0.5, 0.75]


def test_functional_switch(scheduled: tuple[nn.Module, nn.Module]) -> None:
    for training in (False, True):
        for model in scheduled:
            model.train(training)
        assert len(check(scheduled)) == 2 * training
    for model in scheduled:
        model.live = False
    assert set(check(scheduled)) == {":dropout_1"}


def test_functional_rates_of_zero_and_one(scheduled: tuple[nn.Module, nn.Module]) -> None:
    for p in (0.0, 1.0, 0.5):
        for model in scheduled:
            model.p = p
        masks = check(scheduled)
    assert shares(masks) == [0.5, 0.25]


def test_plain_attribute(scheduled: tuple[nn.Module, nn.Module]) -> None:
    for residual in (True, False, True):
        for model in scheduled:
            model.residual = residual
        check(scheduled)


# Modules and parameters


def test_frozen_and_thawed(models: tuple[nn.Module, nn.Module]) -> None:
    for frozen in (True, False, True):
        for model in models:
            model[3].weight.requires_grad_(not frozen)
            model[0].bias.requires_grad_(frozen)
        check(models)


def test_parameter_replaced(models: tuple[nn.Module, nn.Module]) -> None:
    weight = torch.randn(96, 128, dtype=torch.float64)
    for model in models:
        model[3].weight = nn.Parameter(weight.clone())
        model[0].bias.data = torch.ones(128, dtype=torch.float64)
    check(models)


def test_bias_removed(models: tuple[nn.Module, nn.Module]) -> None:
    for model in models:
        model[3].bias = None
    check(models)


def test_layer_replaced(models: tuple[nn.Module, nn.Module]) -> None:
    layer = nn.Linear(128, 96, dtype=torch.float64)
    for model in models:
        model[3] = nn.Linear(128, 96, dtype=torch.float64)
        model[3].load_state_dict(layer.state_dict())
    check(models)


def test_activation_replaced(models: tuple[nn.Module, nn.Module]) -> None:
    for model in models:
        model[1] = nn.Sigmoid()
    check(models)


def test_dropout_replaced_by_identity(models: tuple[nn.Module, nn.Module]) -> None:
    for model in models:
        model[2] = nn.Identity()
    assert set(check(models)) == {"5"}


def test_dropout_replaced_by_dropout(models: tuple[nn.Module, nn.Module]) -> None:
    for model in models:
        model[2] = nn.Dropout(0.75)
    assert dropped_share(check(models)["2"]) == 0.75


def test_widths_changed(models: tuple[nn.Module, nn.Module]) -> None:
    first, second = nn.Linear(64, 192, dtype=torch.float64), nn.Linear(192, 96, dtype=torch.float64)
    for model in models:
        model[0], model[3] = nn.Linear(64, 192, dtype=torch.float64), nn.Linear(192, 96, dtype=torch.float64)
        model[0].load_state_dict(first.state_dict())
        model[3].load_state_dict(second.state_dict())
    assert check(models)["2"].numel() == 192


def test_layer_appended(models: tuple[nn.Module, nn.Module]) -> None:
    for model in models:
        model.append(nn.Tanh())
    check(models)


def test_disabled_takes_effect_at_once(models: tuple[nn.Module, nn.Module]) -> None:
    with dropfx.disabled(), recording() as masks:
        models[1](example())
    assert all((mask == 1).all() for mask in masks.values())
    assert set(check(models)) == {"2", "5"}
