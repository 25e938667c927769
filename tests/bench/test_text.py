"""Texts for language models: what is a word, how a text is split, what is refused."""

import shutil

import pytest

from dropfx.bench import text
from dropfx.errors import InvalidOption


def words(corpus, split):
    return [corpus.words[number] for number in getattr(corpus, split).tolist()]


@pytest.fixture
def file(tmp_path):
    """40 lines, with blank ones between; line n holds the word wN and others."""
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"The Lord's well-known w{n}, said; <unk>!\n  \n" for n in range(40)))
    return path


@pytest.mark.skipif(shutil.which("bible") is None, reason="bible-kjv is not installed")
def test_king_james_bible():
    chapters = text.read_kjv()
    assert len(chapters) == 1189
    assert sum(map(len, chapters)) == 820_735
    assert len(set().union(*chapters)) == 12_772
    assert chapters[0][:5] == ["in", "the", "beginning", "god", "created"]


def test_lines_of_a_file(file):
    corpus = text.load(text=file)
    assert corpus.name == "lines.txt"
    line = ["the", "lord's", "well-known", "w0", "said", text.UNKNOWN, text.END]
    assert words(corpus, "train")[:7] == line
    # lines 10 and 30, and 19 and 39; their own words are not known from training
    assert words(corpus, "valid") == 2 * ["the", "lord's", "well-known", text.UNKNOWN, "said", text.UNKNOWN, text.END]
    assert corpus.test.equal(corpus.valid)
    assert len(corpus.train) == 36 * 7
    assert corpus.words[:3] == [text.END, text.UNKNOWN, "the"]
    assert len(corpus.words) == 2 + 4 + 36


def test_vocabulary_holds_the_most_frequent_words(file):
    corpus = text.load(text=file, vocabulary=5)
    assert corpus.words == [text.END, text.UNKNOWN, "the", "lord's", "well-known"]
    assert words(corpus, "train")[3:6] == 3 * [text.UNKNOWN]
    assert text.most_frequent(["b", "a", "a", "b", "c"], 4) == [text.END, text.UNKNOWN, "b", "a"]


def test_splits_are_runs_of_lines_of_a_long_file(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"word{n}\n" for n in range(1000)))
    documents = text.read_file(path)
    assert len(documents) == 200
    assert documents[1] == [word for n in range(5, 10) for word in (f"word{n}", text.END)]


@pytest.mark.parametrize("inner", ["", "package"])
def test_brown_corpus(tmp_path, inner):
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    (folder / "README").write_text("no text")
    for number in range(20):
        tagged = "\n\n\tThe/at caf\xe9/nn and/or/cc ``/`` Atlanta's/np$ ./.\n"
        (folder / f"ca{number:02}").write_text(tagged, "latin-1")
    corpus = text.load(brown=tmp_path)
    assert corpus.name == "Brown corpus"
    assert words(corpus, "valid") == ["the", "caf\xe9", "and", "or", "atlanta's", text.END]
    assert len(corpus.train) == 18 * 6


def test_texts_that_cannot_be_read(tmp_path, file):
    with pytest.raises(InvalidOption, match=r"cannot read .*nothing"):
        text.load(text=tmp_path / "nothing")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidOption, match="cannot read"):
        text.load(text=binary)
    with pytest.raises(InvalidOption, match="does not exist"):
        text.load(brown=tmp_path / "nothing")
    with pytest.raises(InvalidOption, match="no files named like ca01"):
        text.load(brown=tmp_path)
    with pytest.raises(InvalidOption, match="accepted is one of them"):
        text.load(text=file, brown=tmp_path)
    short = tmp_path / "short"
    short.write_text("a b\n" * 19)
    with pytest.raises(InvalidOption, match="too short, 19 lines"):
        text.load(text=short)
    with pytest.raises(InvalidOption, match="vocabulary: got 2"):
        text.load(text=file, vocabulary=2)


def test_the_bible_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidOption, match="Debian's package bible-kjv"):
        text.load()
    for script, message in (("exit 1", "fails"), ("echo Nothing", "prints no verses")):
        command = tmp_path / "bible"
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
        with pytest.raises(InvalidOption, match=message):
            text.load()
