"""Real texts for the examples: the King James Bible, the Brown corpus, or a text file."""

import torch

from dropfx.bench import text


def load(
    file: str | None, brown: str | None, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Word numbers int64 [n] for training, validation and testing, and the words; ValueError where there is no text."""
    corpus = text.load(file, brown, vocabulary)
    return corpus.train, corpus.valid, corpus.test, corpus.words
