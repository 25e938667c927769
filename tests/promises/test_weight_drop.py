"""WeightDrop around recurrent modules: what is rewritten, what the module keeps, what runs as written and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropfx
from dropfx import ops
from dropfx.draws.runtime import shared
from dropfx.graph.device_costs import DEVICES
from dropfx.graph.pass_infra import Context, run_passes
from dropfx.options import make_options
from dropfx.passes import PIPELINE
from tests.capture import trace
from tests.catalogue import CASES
from tests.catalogue.case import Case, Draw, check_step, compiled_run
from tests.catalogue.recurrent import Around, WeightDrop, WeightDropOutside
from tests.oracle import oracle

SITE = "rnn:dropout_1"
FORMS = (
    "weight_drop",
    "weight_drop_outside",
    "weight_drop_layers",
    "weight_drop_gru",
    "weight_drop_own",
    "weight_drop_rows",
)


def around(rnn: nn.Module, units: int = 64) -> nn.Module:
    model = Around(nn.LSTM(64, units))
    model.rnn = rnn  # type: ignore[assignment]
    return model


def example(length: int = 5, batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return Draw(dtype, 0)(length, batch, 64)


def site(model: nn.Module, *args: Any, **options: Any) -> Any:
    report = dropfx.explain(model, *args, options={"min_speedup": 0, **options})
    (found,) = (one for one in report.sites if one.name == SITE)
    return found


# -- what is rewritten ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["block", "slice", "row"])
@pytest.mark.parametrize("name", FORMS)
def test_patterns(name: str, pattern: str) -> None:
    case: Case = CASES[name]
    original, compiled = case.make(torch.float64), case.make(torch.float64)
    dropfx.compile(compiled, pattern=pattern, min_speedup=0)
    for step in range(3):
        args, _ = case.call(4, torch.float64, step)
        masks = check_step(original, compiled, args, dtype=torch.float64, seed=step)
        assert masks[SITE].shape == ((4 * 64, 1) if name == "weight_drop_rows" else (64,))


@pytest.mark.parametrize("groups", [2, "time"])
def test_groups_leave_one_draw_of_a_weight(groups: Any) -> None:
    original, compiled = (around(WeightDrop(nn.LSTM(64, 64))).double() for _ in range(2))
    compiled.load_state_dict(original.state_dict())
    dropfx.compile(compiled, groups=groups, min_speedup=0)
    masks = check_step(original, compiled, (example(dtype=torch.float64),), dtype=torch.float64)
    assert masks[SITE].numel() == 64


def test_large_weights_in_single_precision() -> None:
    """Whose kept columns are brought into oneDNN's layout, beside PyTorch's LSTM in one piece."""
    original = around(WeightDropOutside(nn.LSTM(64, 512)), 512)
    compiled = around(WeightDropOutside(nn.LSTM(64, 512)), 512)
    compiled.load_state_dict(original.state_dict())
    dropfx.compile(compiled, min_speedup=0)
    check_step(original, compiled, (example(length=10),))


def test_assert_equivalent() -> None:
    for name in FORMS:
        args, _ = CASES[name].call(4, torch.float64)
        dropfx.testing.assert_equivalent(CASES[name].make(torch.float64), *args, options={"min_speedup": 0})


def test_rate_follows_the_wrapper() -> None:
    model = dropfx.compile(around(WeightDrop(nn.LSTM(64, 64))), min_speedup=0)
    traces = None
    for p in (0.5, 0.25, 0.75):
        model.rnn.p = p
        _, masks = compiled_run(model, (example(),))
        assert float((masks[SITE] == 0).double().mean()) == pytest.approx(p, abs=0.02)
        traces = traces or shared.rewritten
    assert shared.rewritten <= traces + 1  # from the first change on it is an input


def test_predicted_gain_decides() -> None:
    """Small steps cost more by themselves than PyTorch's in one piece; large ones gain."""
    small = around(WeightDrop(nn.LSTM(64, 64)))
    assert "costs more than it saves" in site(small, example(), min_speedup=1.05).reason
    large = around(WeightDrop(nn.LSTM(64, 1024)), 1024)
    found = site(large, example(length=20, batch=32), min_speedup=1.05)
    assert found.rewritten
    assert found.flops_compact == found.flops_dense // 2


# -- what the module keeps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight_drop_outside", "weight_drop_own"])
def test_eval_is_the_models(name: str) -> None:
    case = CASES[name]
    original, compiled = case.make(), dropfx.compile(case.make(), min_speedup=0)
    args, _ = case.call(4)
    for _ in range(2):
        compiled.train()
        compiled_run(compiled, args)
        original.eval(), compiled.eval()
        ours, theirs = compiled(*args), original(*args)
        assert torch.equal(
            ours[0] if isinstance(ours, tuple) else ours, theirs[0] if isinstance(theirs, tuple) else theirs
        )
    assert list(compiled.state_dict()) == list(original.state_dict())
    dropfx.restore(compiled).train()
    original.train()
    outcomes = []
    for model in (original, compiled):
        oracle.set_seed(3)
        outcomes.append(oracle.run(model, args).outputs)
    assert all(torch.equal(a, b) for a, b in zip(*(o.values() for o in outcomes), strict=True) if isinstance(a, Tensor))


def test_what_the_forward_writes_is_the_weight_under_the_mask() -> None:
    model = dropfx.compile(around(WeightDrop(nn.LSTM(64, 64))), min_speedup=0)
    _, masks = compiled_run(model, (example(),))
    inner = model.rnn.module
    torch.testing.assert_close(inner.weight_hh_l0, inner.weight_hh_l0_raw * masks[SITE])
    assert nn.LSTM.forward.__module__ == "torch.nn.modules.rnn"


def test_a_call_as_written_writes() -> None:
    model = around(WeightDrop(nn.LSTM(64, 64))).eval()
    dropfx.compile(model, min_speedup=0)
    model(example())
    inner = model.rnn.module
    assert torch.equal(inner.weight_hh_l0, inner.weight_hh_l0_raw)
    # where nothing drops F.dropout returns the parameter itself, which the write makes one of this name too
    with pytest.raises(TypeError, match="cannot assign"):
        model.train()(example())


# -- what runs as written -------------------------------------------------------------------------------------------


def test_tiles_of_the_weight_run_as_written() -> None:
    case = CASES["weight_drop"]
    reason = "it drops the recurrent weight W_hh, which pattern='tile' cannot; 'block', 'slice' and 'row' can"
    assert site(case.make(), *case.call(4)[0], pattern="tile").reason == reason


class AlsoPenalised(WeightDrop):
    """The dropped weight is read a second time, after it was written: as the value that it is."""

    def forward(self, *args: Any) -> Any:
        self.scatter_weights()
        out, state = self.module.forward(*args)
        return out + 1e-3 * self.module.weight_hh_l0.square().sum(), state


def test_another_reader_of_the_weight() -> None:
    original, compiled = (around(AlsoPenalised(nn.LSTM(64, 64))).double() for _ in range(2))
    compiled.load_state_dict(original.state_dict())
    dropfx.compile(compiled, min_speedup=0)
    masks = check_step(original, compiled, (example(dtype=torch.float64),), dtype=torch.float64)
    assert SITE in masks


def test_gathered_weights_stay_out_of_the_function_in_one_piece() -> None:
    case = CASES["weight_drop"]
    model, context = case.make(), Context(make_options(min_speedup=0), DEVICES["cpu"])
    graph = run_passes(model, trace(model, case.call(4)[0], {}), PIPELINE, context)
    targets = [node.target for node in graph.nodes]
    assert targets.count(ops.EAGER[ops.recurrence_op]) == targets.count(torch.lstm) == 1
    assert F.dropout not in targets


def test_disabled_drops_nothing() -> None:
    original, compiled = (around(WeightDrop(nn.LSTM(64, 64))).double() for _ in range(2))
    compiled.load_state_dict(original.state_dict())
    dropfx.compile(compiled, min_speedup=0)
    x = example(dtype=torch.float64)
    compiled(x)
    with dropfx.disabled():
        ours = compiled(x)
    original.rnn.p = original.drop1.p = original.drop2.p = 0.0
    torch.testing.assert_close(ours, original(x))


def test_rates_of_nothing_and_everything() -> None:
    model, other = (around(WeightDrop(nn.LSTM(64, 64))).double() for _ in range(2))
    other.load_state_dict(model.state_dict())
    dropfx.compile(model, min_speedup=0)
    for p in (0.5, 1.0, 0.25, 0.0):  # a rate of 0 last, behind which the original cannot write its attribute again
        model.rnn.p = other.rnn.p = p
        check_step(other, model, (example(dtype=torch.float64),), dtype=torch.float64)


def test_a_weight_that_does_not_pay_is_dropped_as_written() -> None:
    """PyTorch's own mask, in the graph that rewrites what is around it."""
    model = around(WeightDrop(nn.LSTM(64, 64)))
    dropfx.compile(model)
    _, masks = compiled_run(model, (example(),))
    assert SITE not in masks
    assert model.rnn.module.weight_hh_l0_raw.grad is not None


def test_training_learns_the_raw_weight() -> None:
    model = dropfx.compile(around(WeightDropOutside(nn.LSTM(64, 64))), min_speedup=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.rnn.weight_hh_l0_raw.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        with dropfx.testing.record() as masks:
            model(example()).square().mean().backward()
        dropped = masks[0][SITE].view(-1) == 0
        assert not model.rnn.weight_hh_l0_raw.grad[:, dropped].any()
        optimizer.step()
    assert not torch.equal(before, model.rnn.weight_hh_l0_raw)


def test_frozen_weight() -> None:
    model = around(WeightDrop(nn.LSTM(64, 64)))
    model.rnn.module.weight_hh_l0_raw.requires_grad_(False)
    dropfx.compile(model, min_speedup=0)(example()).sum().backward()
    assert model.rnn.module.weight_hh_l0_raw.grad is None
    assert model.rnn.module.weight_ih_l0.grad is not None
