"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): the binary and the python version, as folders or as .tar.gz."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.untrusted import Malformed
from ..errors import UsageError
from .array_pickle import Array, read_arrays
from .augment import Augment
from .images import ImageSet, Read
from .packed_cifar import is_packed, read_packed
from .places import Remote, read_members, search

SHAPE = (3, 32, 32)
_PIXELS = prod(SHAPE)
_LIMIT = 256 << 20  # the largest member, CIFAR-100's pickle of all training images, has 155 MB
_SITE = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True, slots=True)
class _Version:
    classes: int
    batches: dict[str, tuple[str, ...]]  # files of a split: plain in the python version, with .bin in the binary one
    label_key: str  # in the pickles
    label_bytes: int  # before the pixels of a binary record; the last one is the label
    folders: tuple[str, str]  # python, binary
    archives: tuple[Remote, Remote]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_CIFAR = {
    "cifar10": _Version(
        10,
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        "labels",
        1,
        ("cifar-10-batches-py", "cifar-10-batches-bin"),
        (
            Remote(f"{_SITE}cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071),
            Remote(f"{_SITE}cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 170_052_171),
        ),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": _Version(
        100,
        {"train": ("train",), "test": ("test",)},
        "fine_labels",
        2,
        ("cifar-100-python", "cifar-100-binary"),
        (
            Remote(f"{_SITE}cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", 169_001_437),
            Remote(f"{_SITE}cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 168_513_733),
        ),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
}


def open_cifar10(root: str | Path | None = None, *, download: bool = False) -> ImageSet:
    """CIFAR-10: 50,000 and 10,000 images [3, 32, 32] of 10 classes. Raises UsageError where it is not there."""
    return _open("cifar10", root, download)


def open_cifar100(root: str | Path | None = None, *, download: bool = False) -> ImageSet:
    """CIFAR-100, fine labels: 50,000 and 10,000 images [3, 32, 32] of 100 classes. Raises UsageError where it is not there."""
    return _open("cifar100", root, download)


def _open(name: str, root: str | Path | None, download: bool) -> ImageSet:
    version = _CIFAR[name]
    archives = [remote.file_name for remote in version.archives]
    packed = ["cifar-100"] if name == "cifar100" else []
    place, read = search(
        name,
        root,
        [*version.folders, *archives, *packed],
        partial(_recognise, version),
        remotes=version.archives[:1],
        download=download,
    )
    return ImageSet(
        name,
        read,
        split_names=tuple(version.batches),
        shape=SHAPE,
        classes=version.classes,
        source=str(place),
        mean=version.mean,
        std=version.std,
        augment=Augment(crop=4, flip=True),
    )


def _recognise(version: _Version, place: Path) -> tuple[Path, Read] | None:
    """How to read a place that holds this version: by its name if an archive, by the last of its files if a folder."""
    if place.is_file():
        for remote, read in zip(version.archives, (_read_python, _read_binary), strict=True):
            if place.name == remote.file_name:
                return place, partial(_read, version, place, read)
        return None
    last = version.batches["test"][-1]
    # CIFAR-10 and CIFAR-100 have other file names, so a folder of one is never taken for the other.
    if (place / f"{last}.bin").is_file():
        return place, partial(_read, version, place, _read_binary)
    if (place / last).is_file():
        return place, partial(_read, version, place, _read_python)
    if version.classes == 100 and is_packed(place):
        return place, partial(read_packed, place)
    return None


_ReadFile = Callable[[_Version, bytearray], tuple[Tensor, Tensor]]


def _read(version: _Version, place: Path, read: _ReadFile, split: str) -> tuple[Tensor, Tensor]:
    names = [name + (".bin" if read is _read_binary else "") for name in version.batches[split]]
    members = read_members(place, names, _LIMIT)
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for name in names:
        try:
            image, label = read(version, members.pop(name))
        except Malformed as error:
            raise UsageError(f"{place / name}: {error.what}", hint="delete it and fetch the data set again") from None
        images.append(image)
        labels.append(label)
    return torch.cat(images), torch.cat(labels)


def _read_binary(version: _Version, data: bytearray) -> tuple[Tensor, Tensor]:
    """Records of the label bytes and 3,072 pixels, plane after plane."""
    record = version.label_bytes + _PIXELS
    if not data or len(data) % record:
        raise Malformed(f"its {len(data):,} bytes are not whole records of {record:,}")
    records = torch.frombuffer(data, dtype=torch.uint8).view(-1, record)
    return records[:, version.label_bytes :].reshape(-1, *SHAPE), records[:, version.label_bytes - 1].to(torch.int64)


def _read_python(version: _Version, data: bytearray) -> tuple[Tensor, Tensor]:
    """A pickled dict: `data`, an array of uint8 [N, 3072], and a list of N labels."""
    content = read_arrays(data)
    array, labels = content.get("data"), content.get(version.label_key)
    if not isinstance(array, Array) or not isinstance(labels, list) or not all(isinstance(v, int) for v in labels):
        raise Malformed(f"it has no array `data`, or no list `{version.label_key}` of numbers")
    if array.dtype not in ("u1", "|u1") or array.shape != (len(labels), _PIXELS):
        raise Malformed(f"its array is {array.dtype} {array.shape}, not bytes {(len(labels), _PIXELS)}")
    if len(array.data) != prod(array.shape) or not labels:
        raise Malformed(f"its array has {len(array.data):,} bytes for {array.shape}")
    if any(not 0 <= label < version.classes for label in labels):
        raise Malformed(f"it has labels outside 0 to {version.classes - 1}")
    return torch.frombuffer(bytearray(array.data), dtype=torch.uint8).view(-1, *SHAPE), torch.tensor(labels)
