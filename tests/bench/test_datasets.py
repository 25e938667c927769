"""The embedded data set, the idx reader, and the folder layouts that --data takes."""

import gzip
import hashlib
import struct

import pytest
import torch

from dropfx.bench import datasets
from dropfx.errors import InvalidOption


def idx(tensor):
    header = struct.pack(">BBBB", 0, 0, 8, tensor.dim()) + struct.pack(f">{tensor.dim()}I", *tensor.shape)
    return header + bytes(tensor.flatten().tolist())


def write_split(folder, split, count, suffix=".gz"):
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count, dtype=torch.uint8) % 3
    for name, tensor in (("images-idx3", images), ("labels-idx1", labels)):
        raw = idx(tensor)
        path = folder / f"{split}-{name}-ubyte{suffix}"
        path.write_bytes(gzip.compress(raw) if suffix else raw)
    return images, labels


@pytest.fixture(scope="module")
def embedded():
    return datasets.load()


def test_embedded_files_are_those_of_the_record():
    record = (datasets.EMBEDDED / "README.md").read_text()
    for path in datasets.EMBEDDED.glob("*.gz"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in record


def test_embedded_split_is_stratified_and_normalised(embedded):
    assert (len(embedded.train), len(embedded.test)) == (4000, 1000)
    assert embedded.train.images.shape == (4000, 784)
    assert embedded.train.images.dtype == torch.float32
    assert embedded.train.labels.bincount().tolist() == [400] * 10
    assert embedded.test.labels.bincount().tolist() == [100] * 10
    assert abs(embedded.train.images.mean().item()) < 1e-4
    assert abs(embedded.train.images.std().item() - 1) < 1e-3


def test_embedded_split_never_changes(embedded):
    # figures in the documents rest on it
    assert embedded.train.labels[:12].tolist() == [9, 8, 0, 6, 0, 9, 1, 8, 3, 9, 7, 5]
    assert embedded.test.labels[:12].tolist() == [0, 7, 8, 8, 1, 0, 2, 6, 6, 6, 8, 6]


def test_split_leaves_no_sample_out_or_twice():
    labels = torch.arange(500) // 50
    train, test = datasets.split_indices(labels)
    assert torch.cat([train, test]).sort().values.equal(torch.arange(500))


def test_samples_look_shuffled(embedded):
    assert len(embedded.train.labels[:100].unique()) == 10


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_folder_layouts(tmp_path, below, suffix):
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = write_split(folder, "train", 30, suffix)
    write_split(folder, "t10k", 6, suffix)
    data = datasets.load(tmp_path)
    assert data.train.labels.equal(labels.long())
    assert data.test.images.shape == (6, 16)
    pixels = images.flatten(1).float()
    torch.testing.assert_close(data.train.images, (pixels - pixels.mean()) / pixels.std())
    assert data.name == ("FashionMNIST" if "Fashion" in below else tmp_path.name)


def test_head_takes_the_first_and_zero_takes_all(embedded):
    part = embedded.head(10, 0)
    assert (len(part.train), len(part.test)) == (10, 1000)
    assert part.train.labels.equal(embedded.train.labels[:10])


def test_missing_folder_and_files_are_named(tmp_path):
    with pytest.raises(InvalidOption, match="does not exist"):
        datasets.load(tmp_path / "nowhere")
    with pytest.raises(InvalidOption, match="no train-images-idx3-ubyte"):
        datasets.load(tmp_path)
    write_split(tmp_path, "train", 3)
    with pytest.raises(InvalidOption, match="no t10k-images-idx3-ubyte"):
        datasets.load(tmp_path)


def test_several_data_sets_must_be_told_apart(tmp_path):
    for name in ("FashionMNIST", "MNIST"):
        folder = tmp_path / name / "raw"
        folder.mkdir(parents=True)
        write_split(folder, "train", 3)
    with pytest.raises(InvalidOption, match=r"several data sets.*FashionMNIST.*MNIST"):
        datasets.load(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not an idx file"),
        (b"\x00\x00\x08\x00", "not an idx file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "not an idx file"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", "holds 3 bytes"),
        (b"<html>not found</html>", "not an idx file"),
    ],
)
def test_broken_files_are_refused(tmp_path, raw, message):
    path = tmp_path / "labels"
    path.write_bytes(raw)
    with pytest.raises(InvalidOption, match=message):
        datasets.read_idx(path)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"PK" + raw[2:], lambda raw: raw[:20] + raw[28:]])
def test_broken_archives_are_refused(tmp_path, damage):
    path = tmp_path / "labels.gz"
    path.write_bytes(damage(gzip.compress(idx(torch.arange(100, dtype=torch.uint8)))))
    with pytest.raises(InvalidOption, match="cannot read"):
        datasets.read_idx(path)


def test_counts_must_agree(tmp_path):
    write_split(tmp_path, "train", 5)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.zeros(4, dtype=torch.uint8))))
    with pytest.raises(InvalidOption, match=r"\[5, 4, 4\] and \[4\]"):
        datasets.load(tmp_path)
