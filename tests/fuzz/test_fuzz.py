"""Promise 2 on programs of the fuzzer, and that the fuzzer sees what is wrong. `python -m tests.fuzz` runs more."""

from __future__ import annotations

import pytest
import torch

from tests.fuzz import check as checking
from tests.fuzz.check import check
from tests.fuzz.generate import generate
from tests.fuzz.minimise import live, minimise
from tests.fuzz.oracle import Masks
from tests.fuzz.program import Program, Statement, Step

EACH = {"compile": 24, "eager": 4, "aot_eager": 1}


def check_program(front_end: str, index: int) -> None:
    program = generate(0, index)
    verdict = check(program, front_end)
    assert not verdict.wrong, f"{verdict}\n{program.listing()}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("front_end", "index"), [(name, index) for name, n in EACH.items() for index in range(n)])
def test_program(front_end: str, index: int) -> None:
    check_program(front_end, index)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", range(24, 300))
@pytest.mark.parametrize("front_end", EACH)
def test_more_programs(front_end: str, index: int) -> None:
    check_program(front_end, index)


def feed_forward() -> Program:
    lines = ("x * 1.0", "v0 + 0.5", "self.lin2(self.drop3(F.relu(self.lin1(v1))))", "v2 * 2.0")
    names = ("lin1 = nn.Linear(16, 32)", "lin2 = nn.Linear(32, 8)", "drop3 = nn.Dropout(0.5)")
    return Program(
        name="feed forward",
        setup=("self.cfg = Config()", "self.scale, self.p = 0.5, 0.4", *(f"self.{name}" for name in names)),
        body=tuple(
            Statement(f"v{k} = {line}", f"v{k}", f"v{k - 1}" if k else "x", "input" if k == 0 else "")
            for k, line in enumerate(lines)
        ),
        outputs=("v3", "v1"),
        shape=("b", 16),
        width=8,
        steps=(Step(4, 7), Step(5, 7, ("m.drop3.p = 0.25",)), Step(5, 7, bad=True), Step(6, 7, second_order=True)),
        options="groups=1",
        half=False,
    )


def test_equal_programs_are_made_of_one_seed() -> None:
    assert generate(3, 7).listing() == generate(3, 7).listing() != generate(3, 8).listing()


@pytest.mark.filterwarnings("ignore")
def test_all_steps_are_compared() -> None:
    verdict = check(feed_forward(), "compile")
    assert (verdict.kind, verdict.compared, verdict.sites, verdict.raising) == ("same", 3, 3, True)


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def flipped(frames: list[Masks]) -> Masks:
        return {name: mask.flip(-1) + 0.25 * torch.ones_like(mask) for name, mask in frames[0].items()}

    monkeypatch.setattr(checking, "merged", flipped)
    verdict = check(feed_forward(), "compile")
    assert (verdict.kind, verdict.step) == ("different", 0)


@pytest.mark.filterwarnings("ignore")
def test_dropouts_that_run_as_written_draw_alike_under_inductor() -> None:
    """Else what is wrong would be set down to PyTorch."""
    program = feed_forward().replaced(steps=(Step(4, 7),))
    assert checking._check(program, "inductor", with_dropfx=False).kind == "same"


def test_what_is_not_needed_to_fail_is_dropped() -> None:
    smaller = minimise(feed_forward(), lambda program: any("drop3" in statement.text for statement in program.body))
    assert (len(smaller.steps), len(smaller.outputs), len(smaller.body), smaller.options) == (1, 1, 2, "")


@pytest.mark.filterwarnings("ignore")
def test_an_error_of_dropfx_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "compiled_by", lambda *_: lambda **inputs: 1 / 0)
    assert check(feed_forward(), "compile").kind == "raises"


def test_dead_code_is_left_out() -> None:
    program = feed_forward().replaced(outputs=("v1",))
    assert [statement.target for statement in live(program).body] == ["v0", "v1"]


def test_dropouts_are_written_out_of_place() -> None:
    lines = ("F.dropout(v1, 0.5, self.training, True)\nv2 = v1", "v3 = F.dropout(v2, 0.5, self.training, inplace=True)")
    program = feed_forward().replaced(
        setup=("self.drop4 = nn.Dropout(0.5, inplace=True)",),
        body=tuple(Statement(text, "", "", "") for text in (*lines, "self.drop4(v3)\nv4 = v3")),
    )
    made = checking._out_of_place(program)
    assert made.setup == ("self.drop4 = nn.Dropout(0.5)",)
    assert [statement.text for statement in made.body] == [
        "v1 = F.dropout(v1, 0.5, self.training)\nv2 = v1",
        "v3 = F.dropout(v2, 0.5, self.training)",
        "v3 = self.drop4(v3)\nv4 = v3",
    ]
