"""Texts for word-level language models: the King James Bible, the Brown corpus, any text file.

A text is a list of documents (chapters, files, runs of lines). Every 20th of them is for validation and every 20th for
testing, so that all three splits hold the same kind of text. Words are lower-cased, without punctuation.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import torch
from torch import Tensor

from dropfx.errors import InvalidOption

END, UNKNOWN = "<eos>", "<unk>"
MIN_VOCABULARY = 3  # END, UNKNOWN and a word
_KJV = ("bible", "-f", "-l0", "gen1:1-rev22:21")
_WORD = re.compile(
    r"<\w+>|[^\W_]+(?:['\u2019-][^\W_]+)*"
)  # `<unk>` too: some texts come with their rare words replaced
_SPLIT_EVERY = 20
_FILE_DOCUMENTS = 200
_TIMEOUT = 60

Document = list[str]
"""The words of a document in order, END after each sentence."""


@dataclass(frozen=True)
class Corpus:
    """Word numbers int64 [words] of three splits; number n is `words[n]`.

    `words` are END, UNKNOWN, then the most frequent words of the training split; UNKNOWN stands for all others.
    """

    name: str
    words: list[str]
    train: Tensor
    valid: Tensor
    test: Tensor


def load(text: str | Path | None = None, brown: str | Path | None = None, vocabulary: int = 10_000) -> Corpus:
    """The King James Bible, or the text named.

    Args:
        text: a text file in UTF-8, one sentence per line.
        brown: folder of the Brown corpus' files, `ca01` to `cr09`, words as `word/tag`; or a folder
            that holds them in `package/`, as an unpacked npm package does.
        vocabulary: size of the vocabulary, the most frequent words with END and UNKNOWN among them; smaller where the
            training split has fewer.

    Raises:
        InvalidOption: two texts are named; the text is missing, unreadable or too short; too small a vocabulary.
    """
    if text is not None and brown is not None:
        raise InvalidOption(f"text: got {str(text)!r} and brown: {str(brown)!r}, accepted is one of them")
    if text is not None:
        return make_corpus(Path(text).name, read_file(Path(text)), vocabulary)
    if brown is not None:
        return make_corpus("Brown corpus", read_brown(Path(brown)), vocabulary)
    return make_corpus("King James Bible", read_kjv(), vocabulary)


def make_corpus(name: str, documents: Sequence[Document], vocabulary: int) -> Corpus:
    """Splits the documents and numbers their words.

    Raises:
        InvalidOption: fewer than 20 documents, or a vocabulary below 3.
    """
    if vocabulary < MIN_VOCABULARY:
        raise InvalidOption(f"vocabulary: got {vocabulary}, accepted are integers >= {MIN_VOCABULARY}")
    if len(documents) < _SPLIT_EVERY:
        raise InvalidOption(
            f"{name}: too short, {len(documents)} lines, files or chapters; accepted are {_SPLIT_EVERY} or more"
        )
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for number, document in enumerate(documents):
        place = number % _SPLIT_EVERY
        splits[{_SPLIT_EVERY // 2: "valid", _SPLIT_EVERY - 1: "test"}.get(place, "train")] += document
    words = most_frequent(splits["train"], vocabulary)
    numbers = {word: number for number, word in enumerate(words)}
    unknown = numbers[UNKNOWN]
    encoded = {split: [numbers.get(word, unknown) for word in found] for split, found in splits.items()}
    return Corpus(name, words, **{split: torch.tensor(found) for split, found in encoded.items()})


def most_frequent(words: Iterable[str], size: int) -> list[str]:
    """The `size` most frequent words with END and UNKNOWN among them; of equally frequent ones, the first seen."""
    counts = Counter(words)
    kept = [word for word, _ in counts.most_common() if word not in (END, UNKNOWN)][: size - 2]
    return [END, UNKNOWN, *kept]


def read_kjv() -> list[Document]:
    """The King James Bible, a document a chapter, a sentence a verse, from the command of Debian's `bible-kjv`.

    Raises:
        InvalidOption: the command is missing or fails.
    """
    try:
        done = subprocess.run(
            _KJV, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=_TIMEOUT
        )
    except FileNotFoundError:
        raise InvalidOption(
            "text: none named, and the King James Bible needs the command `bible` of Debian's package bible-kjv; "
            "accepted are also a text file and a folder of the Brown corpus"
        ) from None
    except (subprocess.SubprocessError, OSError) as error:
        raise InvalidOption(f"text: none named, and `{' '.join(_KJV)}` fails: {error}") from error
    verses = [line.split(" ", 1) for line in done.stdout.splitlines() if re.match(r"\w+:\d+ ", line)]
    if not verses:
        raise InvalidOption(f"text: none named, and `{' '.join(_KJV)}` prints no verses")
    # a reference is such as Ge1:1
    chapters = groupby(verses, key=lambda verse: verse[0].partition(":")[0])
    return [_document(words for _, words in chapter) for _, chapter in chapters]


def read_brown(folder: Path) -> list[Document]:
    """The Brown corpus in the order of its genres, one document per file, one sentence per line, without the tags.

    Raises:
        InvalidOption: there is no such folder, or none of the corpus' files in it.
    """
    if not folder.is_dir():
        raise InvalidOption(f"brown: the folder {folder} does not exist")
    for place in (folder, folder / "package"):
        files = sorted(path for path in place.glob("c[a-r][0-9][0-9]") if path.is_file())
        if files:
            return [_document(map(_untagged, path.read_text("latin-1").splitlines())) for path in files]
    raise InvalidOption(f"brown: no files named like ca01 in {folder} or {folder / 'package'}")


def _untagged(line: str) -> str:
    return " ".join(word.rpartition("/")[0] for word in line.split())


def read_file(path: Path) -> list[Document]:
    """A text file, one sentence per line, cut into up to 200 documents of equally many lines.

    Raises:
        InvalidOption: it cannot be read, or is not UTF-8.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if _WORD.search(line)]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"text: cannot read {path}: {error}") from error
    size = max(1, len(lines) // _FILE_DOCUMENTS)
    return [_document(lines[start : start + size]) for start in range(0, len(lines), size)]


def _document(sentences: Iterable[str]) -> Document:
    found = (_WORD.findall(sentence.lower()) for sentence in sentences)
    return list(chain.from_iterable([*words, END] for words in found if words))
