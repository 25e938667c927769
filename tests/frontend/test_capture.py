"""Capture by Dynamo in `dropfx.compile`: limits, breaks, parts called from outside, threads, checkpoints."""

from __future__ import annotations

import copy
import functools
import logging
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint as checkpointing

import dropfx
from dropfx.frontend import capture
from dropfx.frontend.dynamo_settings import CAPTURING, capturing
from dropfx.patterns import Block, Pattern, Slice
from tests.catalogue.case import check_step, mlp, recording

ALL = {"min_speedup": 0}
LOGGER = logging.getLogger("dropfx.tests")


def pair(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    original = model.double()
    return original, dropfx.compile(copy.deepcopy(original), **{**ALL, **options})


def rows(batch: int, width: int = 64) -> Tensor:
    return torch.randn(batch, width, dtype=torch.float64)


def graphs(model: nn.Module) -> int:
    return len(model._dropfx.capture.graphs)  # type: ignore[union-attr]


# -- limits --------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Branches on a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.number = mlp(64, 128, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * 2 if self.number % 2 else self.net(x)


def test_limit_warns_once_and_training_stays_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "RECOMPILE_LIMIT", 3)
    original, compiled = pair(Scaled())
    caught: list[str] = []
    for step in range(8):
        for model in (original, compiled):
            model.number = f"{step}" if step % 2 else step  # type: ignore[assignment]
            model.number = 2 * step  # type: ignore[assignment]
            model.net[0].bias.requires_grad_(step % 3 > 0)
            model.net[3].bias.requires_grad_(step % 2 > 0)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            check_step(original, compiled, (rows(3 + step % 2),), dtype=torch.float64, seed=step, left_alone=("net.2",))
        caught += [str(w.message) for w in found if issubclass(w.category, RuntimeWarning)]
    assert len(caught) == 1
    assert "captured 3 times" in caught[0]
    assert "RECOMPILE_LIMIT" in caught[0]
    assert any("captured 3 times" in reason for reason in compiled._dropfx.capture.left.values())


def test_limits_are_not_the_users() -> None:
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        original, compiled = pair(mlp(64, 128, 8))
        for batch in (3, 4, 5):
            assert set(check_step(original, compiled, (rows(batch),), dtype=torch.float64, seed=batch)) == {"2"}


@pytest.mark.parametrize("functional", [False, True])
def test_schedule_of_rates_over_a_thousand_steps(functional: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 8)
            self.first, self.second, self.p = nn.Dropout(0.5), nn.Dropout(0.5), 0.5

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(torch.relu(self.up(self.second(x))))
            return self.down(F.dropout(h, self.p, self.training) if functional else h)

    model, x = dropfx.compile(Net(), **ALL), torch.randn(4, 64)
    for step in range(1000):
        model.first.p, model.second.p, model.p = 0.1 + 0.0008 * step, 0.8 - 0.0007 * step, 0.2 + 0.0003 * step
        if step in (0, 1, 500, 999):
            with recording() as masks:
                model(x).sum().backward()
            assert {"first", "second"} <= set(masks)
            assert float((masks["first"] == 0).double().mean()) == pytest.approx(model.first.p, abs=0.02)
        else:
            model(x)
    assert graphs(model) <= 3
    assert all(len(graph.variants) <= 2 for graph in model._dropfx.capture.graphs)


def test_rates_of_other_kinds_and_back() -> None:
    original, compiled = pair(mlp(64, 128, 8))
    for step, p in enumerate((0.5, 0.0, 0.25, 1.0, 0.5, 0.0, 0.5)):
        original[2].p = compiled[2].p = p
        masks = check_step(original, compiled, (rows(4),), dtype=torch.float64, seed=step, left_alone=("2",))
        assert set(masks) == ({"2"} if 0 < p < 1 else set())


# -- what ends a graph ---------------------------------------------------------------------------------------------


class Breaks(nn.Module):
    """Dynamo ends its graph between two sites."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = mlp(64, 128, 64), mlp(64, 128, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        torch._dynamo.graph_break()
        return self.after(self.before(x))


def test_sites_on_either_side_of_a_break() -> None:
    original, compiled = pair(Breaks())
    for step in range(8):
        masks = check_step(original, compiled, (rows(3 + step),), dtype=torch.float64, seed=step)
        assert set(masks) == {"before.2", "before.2#2", "after.2"}


def test_explain_names_the_break() -> None:
    report = dropfx.explain(Breaks(), torch.randn(3, 64), options=ALL)
    assert [site.name for site in report.sites] == ["before.2", "before.2#2", "after.2"]
    assert "graph_break" in report.opaque[""]
    assert "graph_break" in str(report)


class Tries(nn.Module):
    """Dynamo cannot go on behind a break within `try`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 128, 8)

    def forward(self, x: Tensor) -> Tensor:
        try:
            torch._dynamo.graph_break()
            return self.net(x)
        finally:
            self.steps = x.dim()


def test_parts_of_a_forward_that_cannot_be_captured() -> None:
    original, compiled = pair(Tries())
    for step in range(3):
        masks = check_step(original, compiled, (rows(3),), dtype=torch.float64, seed=step, left_alone=("net.2",))
    assert set(masks) == {"net.2"}
    dropfx.restore(compiled)
    assert not any("_dropfx" in module.__dict__ for module in compiled.modules())


def test_block_called_twice_across_breaks_is_named_by_its_calls() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.d, self.down = nn.Linear(64, 128), nn.Dropout(0.5), nn.Linear(128, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(self.d(self.up(x)))
            torch._dynamo.graph_break()
            return self.down(self.d(self.up(x)))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blk = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.blk(self.blk(x))

    original, compiled = pair(Twice())
    masks = check_step(original, compiled, (rows(3),), dtype=torch.float64)
    assert set(masks) == {"blk.d", "blk.d#2", "blk.d#3", "blk.d#4"}
    dropfx.testing.assert_equivalent(original, rows(3), options=ALL)


def test_blocks_that_are_alike_have_graphs_of_their_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(64, 128, 64)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x + self.net(x)

    model = nn.Sequential(Block(), Block(), Block())
    sites = {f"{block}.net.2" for block in range(3)}
    original, compiled = pair(model)
    for batch in (3, 4):
        assert set(check_step(original, compiled, (rows(batch),), dtype=torch.float64, seed=batch)) == sites
    assert [site.name for site in dropfx.explain(model, rows(3), options=ALL).sites] == sorted(sites)


def test_wrong_input_raises_what_pytorch_raises_and_the_model_works_on() -> None:
    original, compiled = pair(mlp(64, 128, 8))
    check_step(original, compiled, (rows(3),), dtype=torch.float64)
    for bad in (rows(3, 65), torch.ones(3, 64, dtype=torch.int64), rows(3).float(), "text"):
        with pytest.raises(Exception) as expected:  # noqa: PT011
            original(bad)
        with pytest.raises(type(expected.value)) as error:
            compiled(bad)
        assert str(error.value) == str(expected.value)
    for batch in (3, 5, 7):
        assert set(check_step(original, compiled, (rows(batch),), dtype=torch.float64, seed=batch)) == {"2"}


def test_width_of_a_dropped_axis_that_changes() -> None:
    class Edges(nn.Module):
        """DropEdge on a dense adjacency."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.drop, self.outer = nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 8)

        def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
            return self.outer(self.drop(adjacency) @ self.inner(x))

    original, compiled = pair(Edges())
    for step, nodes in enumerate((32, 48, 16, 40)):
        adjacency = torch.rand(nodes, nodes, dtype=torch.float64)
        check_step(original, compiled, (adjacency, rows(nodes)), dtype=torch.float64, seed=step, left_alone=("drop",))


# -- called from outside -------------------------------------------------------------------------------------------


class Stepped(nn.Module):
    """As a LightningModule: its steps call its parts, and it has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 128, 8)

    def training_step(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()


class Encoder(Stepped):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_parts_of_a_module_without_a_forward() -> None:
    model = dropfx.compile(Stepped(), **ALL)
    with recording() as masks:
        model.training_step(torch.randn(3, 64)).backward()
    assert set(masks) == {"net.2"}
    assert not dropfx.restore(model).net.__dict__.get("_dropfx")


def test_method_in_place_of_the_forward() -> None:
    model = dropfx.compile(Encoder(), **ALL)
    with pytest.warns(RuntimeWarning, match=r"forward of Encoder, but .* not called.*net are compiled on their own"):
        model.encode(torch.randn(3, 64)).sum().backward()
    with recording() as masks:
        model.encode(torch.randn(3, 64)).sum().backward()
    assert set(masks) == {"net.2"}
    with recording() as masks:
        model(torch.randn(3, 64)).sum().backward()
    assert set(masks) == {"net.2"}


def test_backward_without_a_part_to_compile() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.drop = nn.Linear(64, 8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.lin(x))

        def encode(self, x: Tensor) -> Tensor:
            return self.drop(self.lin(x))

    model = dropfx.compile(Flat(), **ALL)
    with pytest.warns(RuntimeWarning, match=r"compile the module that is called"):
        model.encode(torch.randn(3, 64)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(torch.randn(3, 64)).sum().backward()


def test_no_warning_where_the_forward_is_called() -> None:
    model = dropfx.compile(Encoder(), **ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 64)).sum().backward()
        model.encode(torch.randn(3, 64)).sum().backward()


# -- the process around it -----------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    return {name: getattr(torch._dynamo.config, name) for name in CAPTURING}


def test_settings_are_the_user_s_again_behind_a_capture_that_fails() -> None:
    def fail() -> None:
        with capturing():
            assert settings() == CAPTURING
            raise ValueError("mine")

    before = settings(), warnings.filters[:]
    with pytest.raises(ValueError, match="mine"):
        fail()
    assert (settings(), warnings.filters[:]) == before


def test_threads_that_train_at_once() -> None:
    """Four models in four threads, each exact given its own draws, and nothing of PyTorch's is left patched."""
    before = torch.zeros, torch.autograd.Function.apply, nn.LSTM.forward, isinstance, settings(), warnings.filters[:]
    errors: list[BaseException] = []

    def train(seed: int) -> None:
        try:
            model = dropfx.compile(mlp(64, 128, 128, 8).double(), **ALL)
            for step in range(4):
                model(rows(3 + step)).square().sum().backward()
            assert graphs(model) <= 4
            assert int(model[0].weight.grad.any(dim=1).sum()) <= 128
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    now = torch.zeros, torch.autograd.Function.apply, nn.LSTM.forward, isinstance, settings(), warnings.filters[:]
    assert now == before


def test_shallow_copy_has_graphs_of_its_own() -> None:
    model = dropfx.compile(mlp(64, 128, 8), **ALL)
    model(torch.randn(3, 64))
    other = copy.copy(model)
    assert other._dropfx is not model._dropfx
    assert other._dropfx.options is model._dropfx.options
    with recording() as masks:
        other(torch.randn(3, 64))
    assert set(masks) == {"2"}


class Checkpointed(nn.Module):
    """As transformers' layers: it checkpoints in its own `__call__`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 128, 64)

    def __call__(self, *args: Any) -> Any:
        return checkpointing.checkpoint(super().__call__, *args, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def test_checkpoints_of_a_modules_own_call_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Checkpointed() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    compiled = dropfx.compile(Stack(), **ALL)
    made: list[Any] = []
    plain = checkpointing.checkpoint
    monkeypatch.setattr("dropfx.frontend.checkpoints.checkpoint", lambda *a, **k: (made.append(a), plain(*a, **k))[1])
    with recording() as masks:
        compiled(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert len(made) == 3
    assert set(masks) == {f"layers.{layer}.net.2" for layer in range(3)}


def test_checkpoint_saves_memory() -> None:
    """What is saved for backward of a checkpointed stack is its inputs, compiled as well as plain."""

    def saved(model: nn.Module) -> int:
        sizes: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t)
        x = torch.randn(16, 64, requires_grad=True)
        model(x)
        with hooks:
            model(x)
        return sum(sizes)

    once = Checkpointed()
    assert saved(dropfx.compile(copy.deepcopy(once), **ALL)) <= 2 * saved(once)


def test_stance_that_forces_eager_is_heard() -> None:
    model = dropfx.compile(mlp(64, 128, 8), **ALL)
    with torch.compiler.set_stance("force_eager"), recording() as masks:
        model(torch.randn(3, 64))
    assert not masks
    with recording() as masks:
        model(torch.randn(3, 64))
    assert set(masks) == {"2"}


@pytest.mark.slow
def test_memory_stays_flat_over_two_hundred_thousand_steps() -> None:
    import resource

    model = dropfx.compile(mlp(16, 64, 64, 4), **ALL)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    seen: list[int] = []
    for step in range(200_000):
        model[2].p = 0.3 + 0.2 * (step % 7) / 7
        model(torch.randn(4 + step % 5, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20_000 == 0:
            seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert seen[-1] - seen[1] < 8 * 1024  # kilobytes


@pytest.mark.parametrize(
    ("file", "inputs", "pattern"),
    [("compiled_0_1.pt", 4, Slice()), ("compiled_before_folders.pt", 8, Block(4))],
)
def test_model_that_was_saved_by_an_earlier_version(file: str, inputs: int, pattern: Pattern) -> None:
    """`torch.save` of a compiled Linear, ReLU, Dropout, Linear, whose pickle names the modules of then."""
    model = torch.load(Path(__file__).parent / "data" / file, weights_only=False)
    assert type(model).__name__ == "Sequential"
    with recording() as masks:
        model.train()(torch.randn(3, inputs)).sum().backward()
    assert set(masks) == {"2"}
    assert model._dropfx.options.pattern == pattern


def test_a_message_that_is_logged_once_ends_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers logs: by a method of all loggers that remembers what it was called with."""
    monkeypatch.setattr(logging.Logger, "warning_once", functools.lru_cache(logging.Logger.warning), raising=False)

    class Logs(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[1](self[0](x))
            LOGGER.warning_once("said")
            return self[2](x)

    model = Logs(nn.Linear(64, 128), nn.Dropout(), nn.Linear(128, 8))
    assert not dropfx.explain(model, torch.randn(4, 64), options=ALL).opaque


class Chosen(nn.Sequential):
    """Rows are chosen by a mask, so that their number is known only when it runs."""

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        hidden = self[2](self[1](self[0](x)))
        return self[4](self[3](hidden[chosen]))


def test_an_index_by_a_mask_ends_no_graph() -> None:
    """What lies before it is rewritten; what lies behind it runs as written, and `explain` says why."""
    layers = nn.Linear(64, 128), nn.Dropout(), nn.Linear(128, 96), nn.Dropout(), nn.Linear(96, 8)
    model, compiled = pair(Chosen(*layers))
    for batch in (4, 9, 6):
        given = rows(batch), torch.arange(batch) % 3 != 1
        masks = check_step(model, compiled, given, dtype=torch.float64, seed=batch, left_alone=("3",))
        assert set(masks) == {"1"}
    assert not compiled._dropfx.capture.left
    reasons = {site.name: site.reason for site in dropfx.explain(model, *given, options=ALL).sites}
    assert reasons["1"] == ""
    assert "known only when the graph runs" in reasons["3"]


class Attends(nn.Module):
    """Attention with weights, which drops by F.dropout, or without, by scaled_dot_product_attention."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(64, 4, dropout=0.1, batch_first=True), weights
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.attention(x, x, x, need_weights=self.weights)[0]))


@pytest.mark.parametrize("weights", [False, True])
def test_a_schedule_of_attention_s_dropout_takes_two_graphs(weights: bool) -> None:
    model, compiled = pair(Attends(weights))
    x = torch.randn(3, 5, 64, dtype=torch.float64)
    for step in range(12):
        model.attention.dropout = compiled.attention.dropout = 0.1 + step / 20
        masks = check_step(model, compiled, (x,), dtype=torch.float64, seed=step, left_alone=("attention:dropout_1",))
        assert set(masks) == {"drop"}
    assert len(compiled._dropfx.capture.graphs) == 2
