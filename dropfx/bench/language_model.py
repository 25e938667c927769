"""A word-level LSTM language model, and what its benches share of training it.

T steps of a window, B columns of text, H units, V words. The loss is summed over the steps of a window and averaged
over the columns, as in Zaremba et al. (arXiv 1409.2329), whose learning rates and clipping hold for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropfx.errors import InvalidOption
from dropfx.planning.timing import Step

WINDOW = 35
"""Steps that truncated back-propagation goes back."""
CLIP = 5.0
LEARNING_RATE = 1.0
_INITIAL = 0.1

State = tuple[Tensor, Tensor]
"""Hidden and cell state, each [layers, B, H]."""


class LanguageModel(nn.Module):
    """Embedding, dropout, LSTM of two layers with dropout between them, dropout, Linear to the words."""

    def __init__(self, words: int, units: int, rate: float, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, units)
        self.drop_input = nn.Dropout(rate)
        self.lstm = nn.LSTM(units, units, layers, dropout=rate)
        self.drop_output = nn.Dropout(rate)
        self.decoder = nn.Linear(units, words)
        for weight in (self.embedding.weight, self.decoder.weight):
            nn.init.uniform_(weight, -_INITIAL, _INITIAL)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits [T, B, V] of each next word and the state after the window, from words int64 [T, B] and a state."""
        hidden, state = self.lstm(self.drop_input(self.embedding(words)), state)
        return self.decoder(self.drop_output(hidden)), state

    def initial_state(self, batch: int) -> State:
        """Zeros."""
        zeros = self.decoder.weight.new_zeros(self.lstm.num_layers, batch, self.lstm.hidden_size)
        return zeros, zeros.clone()


def train_step(
    runnable: Callable[..., tuple[Tensor, State]],
    optimizer: torch.optim.Optimizer,
    words: Tensor,
    targets: Tensor,
    state: State,
    clip: float = CLIP,
) -> tuple[Tensor, State]:
    """One whole training step: forward, cross-entropy, backward, clipping, update.

    Returns the mean loss of a word and the state that the next window begins with, both detached.
    """
    optimizer.zero_grad(set_to_none=True)
    logits, state = runnable(words, state)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / words.shape[1]
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], clip)
    optimizer.step()
    return loss.detach() / len(words), (state[0].detach(), state[1].detach())


def stepper(runnable: Callable[..., Any], model: LanguageModel, words: Tensor, targets: Tensor) -> Step:
    """A training step on the same window again and again, each from the state that the last has left."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    state = model.initial_state(words.shape[1])

    def step() -> Tensor:
        """One step on the window; returns the mean loss of a word."""
        loss, left = train_step(runnable, optimizer, words, targets, state)
        # into the same memory: a step that releases what an earlier one took has no resting level
        for old, new in zip(state, left, strict=True):
            old.copy_(new)
        return loss

    return step


def columns(words: Tensor, batch: int) -> Tensor:
    """The text [n] as B columns [n // B, B] that are read side by side; what is left over is dropped.

    Raises:
        InvalidOption: too short for two words a column.
    """
    length = len(words) // batch
    if length < 2:
        raise InvalidOption(f"text: a split has {len(words)} words, accepted are {2 * batch} or more for batch {batch}")
    return words[: length * batch].view(batch, length).t().contiguous()


def windows(text: Tensor, steps: int = WINDOW) -> Iterator[tuple[Tensor, Tensor]]:
    """Words and their successors [T, B] in turn, from columns of text; the last window may be shorter."""
    for start in range(0, len(text) - 1, steps):
        end = min(start + steps, len(text) - 1)
        yield text[start:end], text[start + 1 : end + 1]


def perplexity(model: LanguageModel, text: Tensor) -> float:
    """Perplexity of columns of text in eval mode; leaves the model in training mode."""
    model.eval()
    state, total, count = model.initial_state(text.shape[1]), 0.0, 0
    with torch.no_grad():
        for words, targets in windows(text):
            logits, state = model(words, state)
            total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            count += targets.numel()
    model.train()
    return float(torch.tensor(total / count, dtype=torch.float64).exp())  # inf where math.exp overflows
