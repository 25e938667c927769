"""`dropfx bench perplexity`: its variants, its ratios, and that block dropout keeps Bernoulli's perplexity."""

import argparse
import shutil

import pytest
from rich.progress import Progress

from dropfx.bench import fidelity, perplexity, text
from dropfx.bench.perplexity import Outcome, Run
from dropfx.cli import main
from dropfx.errors import InvalidOption
from dropfx.patterns import Row


def settings(*options):
    parser = argparse.ArgumentParser()
    perplexity.add_arguments(parser)
    return parser.parse_args(options)


@pytest.fixture
def corpus():
    return text.make_corpus("counting", [["one", "two", "three", "four", text.END]] * 1000, 10)


def test_variants_are_options_of_compile():
    assert fidelity.options_of("none") is fidelity.options_of("bernoulli") is None
    assert fidelity.options_of("block@4") == {"pattern": "block", "groups": 4, "min_speedup": 0}
    assert fidelity.options_of("block@time") == {"pattern": "block", "groups": "time", "min_speedup": 0}
    options = fidelity.options_of("row:2")
    assert options is not None
    assert isinstance(options["pattern"], Row)


def test_result_is_the_test_perplexity_of_the_best_epoch():
    assert Run(0, valid=[5.0, 3.0, 4.0], test=[6.0, 3.5, 3.0]).result == 3.5


def test_excess_is_paired_by_seed():
    reference = Outcome("bernoulli", runs=[Run(0, [1.0], [100.0]), Run(1, [1.0], [50.0]), Run(2, [1.0], [7.0])])
    other = Outcome("block", runs=[Run(0, [1.0], [110.0]), Run(1, [1.0], [50.0])])  # a run cut short
    assert perplexity.excess(reference, other) == pytest.approx(1.1**0.5 - 1)


def test_every_variant_learns(corpus):
    args = settings("--units", "32", "--batch", "4", "--epochs", "3", "--rate", ".2", "--decay", "1.1")
    *_, outcomes = perplexity.compare(corpus, args, Progress(disable=True))
    trained = {outcome.variant: outcome for outcome in outcomes if outcome.runs}
    assert trained.keys() == set(perplexity.VARIANTS)
    assert trained["block"].rewritten >= 1
    assert trained["block"].sites == 3
    assert trained["bernoulli"].sites == 0
    for outcome in trained.values():
        (run,) = outcome.runs
        assert len(run.valid) == len(run.test) == len(run.seconds) == 3
        assert run.result < len(corpus.words) - 2  # better than a guess among the words


def loss_of_a_draw_a_step(corpus, *options):
    """By what share the perplexity of block dropout, drawn anew at each step, is above Bernoulli dropout's."""
    args = settings("--variants", "block@time", *options)
    *_, (bernoulli, block) = perplexity.compare(corpus, args, Progress(disable=True))
    assert (bernoulli.sites, block.rewritten, block.sites) == (0, 3, 3)
    return perplexity.excess(bernoulli, block)


def test_a_draw_a_step_costs_little_on_an_easy_text(corpus):
    """What the slow test does, in seconds."""
    small = ("--units", "32", "--batch", "10", "--epochs", "2", "--rate", ".2")
    assert abs(loss_of_a_draw_a_step(corpus, *small)) < 0.2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bible") is None, reason="bible-kjv is not installed")
def test_a_draw_a_step_keeps_the_perplexity_of_bernoulli_dropout():
    """King James Bible, 2x200 units, p=.5, 3 epochs, 1 seed, as `dropfx bench perplexity` has them; takes an hour."""
    assert loss_of_a_draw_a_step(text.load()) <= 0.02


def test_a_seed_repeats_a_training(corpus):
    args = settings("--units", "16", "--batch", "4", "--epochs", "1")
    first, again, other = (perplexity.train("block", corpus, s, args, lambda _: None).test for s in (1, 1, 2))
    assert first == again != other


def test_what_dropfx_refuses_is_unsupported_and_the_others_go_on(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("one two three four\n" * 40)
    small = ["--units", "16", "--batch", "4", "--epochs", "1", "--variants", "tile@2", "none", "--malloc", "system"]
    assert main(["bench", "perplexity", "--text", str(path), *small, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "tile@2 is unsupported: groups: got 2" in printed.replace("\n", " ")
    assert (tmp_path / "perplexity.md").read_text().count("unsupported") == 1


def test_unknown_variants_are_refused(corpus):
    with pytest.raises(InvalidOption, match="stripes"):
        next(perplexity.compare(corpus, settings("--variants", "stripes"), Progress(disable=True)))
