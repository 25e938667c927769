"""Image data sets in the idx format of MNIST: the embedded MNIST-5k, and folders of the same layout.

An idx file is a big-endian header, two zero bytes, one for the type (8: uint8), one for the number of dimensions, then
each dimension as uint32, followed by the values (LeCun's description of MNIST).
"""

from __future__ import annotations

import gzip
import math
import random
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dropfx.errors import InvalidOption

EMBEDDED = Path(__file__).parent / "data"
IMAGES = "{split}-images-idx3-ubyte"
LABELS = "{split}-labels-idx1-ubyte"
_UINT8 = 8
_SPLIT_SEED = 5000
_TEST_SHARE = 5  # one image in five of each class is a test image


@dataclass(frozen=True)
class Split:
    """Images float32 [n, pixels], of mean 0 and standard deviation 1 over the training split; labels int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, count: int) -> Split:
        """The first `count` samples, all where `count` is 0 or more than there are."""
        return Split(self.images[: count or None], self.labels[: count or None])


@dataclass(frozen=True)
class Dataset:
    """Training and test split under a name for tables."""

    name: str
    train: Split
    test: Split

    def head(self, train: int, test: int = 0) -> Dataset:
        """The first `train` and `test` samples of the splits; 0 takes all."""
        return replace(self, train=self.train.head(train), test=self.test.head(test))


def load(directory: str | Path | None = None) -> Dataset:
    """The embedded MNIST-5k, or the data set of `directory`.

    Args:
        directory: holds `{train,t10k}-{images-idx3,labels-idx1}-ubyte`, each with or without `.gz`; or torchvision's
            folder above it, `NAME/raw/` (NAME is FashionMNIST, MNIST, ...).

    Raises:
        InvalidOption: no such folder or files, more than one data set below it, or not in the idx format.
    """
    if directory is None:
        return _mnist5k()
    folder = _find_folder(Path(directory))
    train, test = (_read_split(folder, name) for name in ("train", "t10k"))
    name = folder.parent.name if folder.name == "raw" else folder.name
    return _normalised(name, train, test)


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor in an idx file, gzip-compressed if its name ends in `.gz`.

    Raises:
        InvalidOption: unreadable, or not an idx file of uint8.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidOption(f"cannot read {path}: {error}") from error
    if len(raw) < 4 or raw[0] or raw[1] or raw[2] != _UINT8 or not raw[3] or len(raw) < 4 + 4 * raw[3]:
        raise InvalidOption(f"{path} is not an idx file of bytes (two zero bytes, 8, number of dimensions)")
    start = 4 + 4 * raw[3]
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise InvalidOption(f"{path} holds {len(raw) - start} bytes, its header says {list(shape)}")
    if len(raw) == start:
        return torch.empty(shape, dtype=torch.uint8)
    # bytearray: frombuffer warns of memory that cannot be written
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).view(shape)


def _find_folder(root: Path) -> Path:
    if not root.is_dir():
        raise InvalidOption(f"data folder {root} does not exist")
    for folder in (root, root / "raw"):
        if _find_file(folder, IMAGES.format(split="train")) is not None:
            return folder
    found = [folder for folder in sorted(root.glob("*/raw")) if _find_file(folder, IMAGES.format(split="train"))]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(folder.parent) for folder in found)
        raise InvalidOption(f"{root} holds several data sets, name one of them: {names}")
    expected = f"{IMAGES.format(split='train')}[.gz]"
    raise InvalidOption(f"no {expected} in {root}, {root}/raw or {root}/NAME/raw")


def _find_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _need_file(folder: Path, name: str) -> Path:
    path = _find_file(folder, name)
    if path is None:
        raise InvalidOption(f"no {name}[.gz] in {folder}")
    return path


def _read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [n, pixels] and labels int64 [n]."""
    images, labels = (read_idx(_need_file(folder, name.format(split=split))) for name in (IMAGES, LABELS))
    return _checked(images, labels, where=f"{folder}, {split}")


def _checked(images: Tensor, labels: Tensor, where: str) -> tuple[Tensor, Tensor]:
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels) or not len(labels):
        raise InvalidOption(
            f"{where}: expected images [n, height, width] and labels [n] with n > 0, "
            f"found {list(images.shape)} and {list(labels.shape)}"
        )
    return images.flatten(1), labels.long()


def _mnist5k() -> Dataset:
    """4,000 / 1,000 images, 400 / 100 of each class, chosen and shuffled by a fixed seed."""
    images, labels = _checked(
        read_idx(EMBEDDED / "mnist5k-images-idx3-ubyte.gz"),
        read_idx(EMBEDDED / "mnist5k-labels-idx1-ubyte.gz"),
        where="MNIST-5k",
    )
    train, test = split_indices(labels)
    return _normalised("MNIST-5k", (images[train], labels[train]), (images[test], labels[test]))


def split_indices(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Training and test positions in labels [n], stratified: the same on every machine and with every torch version."""
    generator = random.Random(_SPLIT_SEED)
    train: list[int] = []
    test: list[int] = []
    for label in labels.unique().tolist():
        positions = (labels == label).nonzero().flatten().tolist()
        # sorted by random keys: random() is specified across Python versions, shuffle() is not
        positions.sort(key={position: generator.random() for position in positions}.__getitem__)
        count = len(positions) // _TEST_SHARE
        test += positions[:count]
        train += positions[count:]
    for indices in (train, test):
        indices.sort(key={position: generator.random() for position in indices}.__getitem__)
    return torch.tensor(train), torch.tensor(test)


def _normalised(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Dataset:
    pixels = train[0].float()
    mean, scale = pixels.mean(), pixels.std().clamp_min(1.0)
    return Dataset(
        name,
        Split((pixels - mean) / scale, train[1]),
        Split((test[0].float() - mean) / scale, test[1]),
    )
