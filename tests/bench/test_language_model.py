"""The language model of the benches: its windows, its perplexity, and `dropfx bench lstm`'s case."""

import argparse

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dropfx
from dropfx.bench import harness, language_model, lstm, steps
from dropfx.bench.language_model import LanguageModel
from dropfx.errors import InvalidOption


def test_windows_pair_every_word_with_its_successor():
    text = language_model.columns(torch.arange(47), 2)
    assert text.shape == (23, 2)
    assert text[:, 1].tolist() == list(range(23, 46))
    found = list(language_model.windows(text, 10))
    assert [len(words) for words, _ in found] == [10, 10, 2]
    assert torch.cat([words for words, _ in found]).equal(text[:-1])
    assert all(targets.equal(words + 1) for words, targets in found)


def test_short_texts_are_refused():
    with pytest.raises(InvalidOption, match="39 words, accepted are 40 or more for batch 20"):
        language_model.columns(torch.arange(39), 20)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    model = LanguageModel(50, 8, 0.5)
    torch.nn.init.zeros_(model.decoder.weight)
    text = language_model.columns(torch.randint(50, (200,)), 4)
    assert language_model.perplexity(model, text) == pytest.approx(50)
    assert model.training


def test_perplexity_carries_the_state_over_windows():
    torch.manual_seed(0)
    model = LanguageModel(50, 8, 0.5).eval()
    text = language_model.columns(torch.randint(50, (400,)), 4)
    with torch.no_grad():
        logits, _ = model(text[:-1], model.initial_state(4))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[1:].flatten())
    assert language_model.perplexity(model, text) == pytest.approx(loss.exp().item(), rel=1e-5)


def test_training_step_is_the_literature_s():
    """The loss summed over steps and averaged over columns; the norm of all gradients clipped."""
    torch.manual_seed(0)
    model = LanguageModel(20, 8, 0.0)
    words, targets = torch.randint(20, (2, 6, 3))
    before = [weight.detach().clone() for weight in model.parameters()]
    logits, _ = model(words, model.initial_state(3))
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    gradients = torch.autograd.grad(losses.view(6, 3).mean(1).sum(), list(model.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss, state = language_model.train_step(model, optimizer, words, targets, model.initial_state(3), clip=0.01)
    assert loss.item() == pytest.approx(losses.mean().item())
    assert not any(part.requires_grad for part in state)
    for old, new, gradient in zip(before, model.parameters(), gradients, strict=True):
        torch.testing.assert_close(new, old - 0.5 * 0.01 / norm * gradient)


def test_a_step_leaves_nothing_behind():
    model = LanguageModel(50, 16, 0.5)
    words = torch.randint(50, (5, 4))
    step = language_model.stepper(model, model, words, words)
    step()
    model.zero_grad(set_to_none=True)
    peak = harness.peak_memory(step)
    model.zero_grad(set_to_none=True)
    assert harness.peak_memory(step) == peak


@pytest.mark.parametrize(("units", "expected"), [(650, (1.28, 1.57, 2.04)), (1500, (1.24, 1.46, 1.80))])
def test_flop_ceiling(units, expected):
    for rate, value in zip((0.3, 0.5, 0.7), expected, strict=True):
        case = lstm.Case(units, vocabulary=8800, batch=20, rate=rate)
        assert case.ceiling([rate] * 3) == pytest.approx(value, abs=0.006)
        assert case.ceiling([0, 0, 0]) == 1


def test_ceiling_counts_the_products_of_a_step():
    """3 products each of W_ih, W_hh and the decoder in every step of the window, as PyTorch counts them."""
    units, words, batch, window = 16, 40, 4, 5
    model = LanguageModel(words, units, 0.5).double()  # oneDNN's fused LSTM, which is not counted, has float32 only
    text = torch.randint(words, (window, batch))
    state = tuple(part.requires_grad_() for part in model.initial_state(batch))
    with FlopCounterMode(display=False) as counter:
        logits, _ = model(text, state)
        logits.sum().backward()
    dense = 2 * 3 * window * batch * (2 * 2 * 4 * units * units + units * words)
    assert counter.get_total_flops() == dense
    gates, decoder = (2 * 3 * window * batch * size for size in (4 * units * units, units * words))
    assert lstm.flop_ceiling(units, words, [0.25, 1, 1]) == pytest.approx(dense / (dense - 0.75 * gates))
    assert lstm.flop_ceiling(units, words, [1, 1, 0.25]) == pytest.approx(dense / (dense - 0.75 * decoder))


def test_default_cases():
    parser = argparse.ArgumentParser()
    lstm.add_arguments(parser)
    cases = lstm.cases(parser.parse_args([]))
    assert len(cases) == 2 * 2 * 2 * 3
    assert cases[0] == lstm.Case(650, 8800, 20, 0.3, 35)
    assert cases[0].net == "2x650, 8800"


def test_dropfx_s_step_uses_its_draws():
    case = lstm.Case(64, 200, 4, 0.5, window=5)
    work = case.workload()
    model = dropfx.compile(work.model, min_speedup=0)
    with dropfx.testing.record() as masks:
        step = work.make_step(model, model)
        step(), step()
    assert len(masks) == 2
    assert masks[0].keys() == masks[1].keys()


def test_torch_compile_is_measured_as_its_user_gets_it():
    """Also where something in the process lets Dynamo into nn.LSTM."""
    seen = set()

    class Case(lstm.Case):
        def workload(self):
            work = super().workload()

            def make_step(runnable, model):
                step = work.make_step(runnable, model)
                return lambda: (step(), seen.add(torch._dynamo.config.allow_rnn))

            return steps.Workload(work.model, work.inputs, make_step)

    with torch._dynamo.config.patch(allow_rnn=True):
        result = steps.measure(Case(16, 50, 4, 0.5, window=5), {"pattern": "block"}, ["eager"], rounds=1)
        assert torch._dynamo.config.allow_rnn
    assert seen == {False}
    assert len(result.drawn_rates) == 3
