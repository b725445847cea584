"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): the binary and the python version, as folders or as .tar.gz."""

from __future__ import annotations

import io
import pickle  # only the restricted reader at the end of this file reads pickles
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .places import Remote, read_members, search
from .source import DataSource

if TYPE_CHECKING:
    from torch import Tensor

    from .images import ImageSet, Read

# torch is imported when a set is opened: recipes read the facts below without it.

SHAPE = (3, 32, 32)
_PIXELS = prod(SHAPE)
_LIMIT = 256 << 20  # bytes; the largest member, CIFAR-100's pickle of all training images, has 155 MB
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


def _source(name: str, opener: Callable[..., ImageSet]) -> DataSource:
    classes = _CIFAR[name].classes
    return DataSource(
        name=name,
        kind="image",
        open=opener,
        summary=f"60,000 photographs of 32 x 32, {classes} classes",
        image=SHAPE,
        classes=classes,
        samples=50_000,
        splits=("train", "test"),
        can_hold_out=True,
        settings="cifar",
    )


CIFAR10 = _source("cifar10", open_cifar10)
CIFAR100 = _source("cifar100", open_cifar100)


def _open(name: str, root: str | Path | None, download: bool) -> ImageSet:
    from .augment import Augment
    from .images import ImageSet

    version = _CIFAR[name]
    archives = [remote.file_name for remote in version.archives]
    place, read = search(
        name,
        root,
        [*version.folders, *archives],
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
    return None


_ReadFile = Callable[[_Version, bytearray], "tuple[Tensor, Tensor]"]


class UnreadableArrays(Exception):
    """A file of the data set that does not hold what it should; the message says why."""


def _read(version: _Version, place: Path, read: _ReadFile, split: str) -> tuple[Tensor, Tensor]:
    """uint8 images [N, 3, 32, 32] and labels int64 [N] of a split."""
    import torch

    names = [name + (".bin" if read is _read_binary else "") for name in version.batches[split]]
    members = read_members(place, names, _LIMIT)
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for name in names:
        try:
            image, label = read(version, members.pop(name))
        except UnreadableArrays as error:
            raise UsageError(f"{place / name}: {error}", hint="delete it and fetch the data set again") from None
        images.append(image)
        labels.append(label)
    return torch.cat(images), torch.cat(labels)


def _read_binary(version: _Version, data: bytearray) -> tuple[Tensor, Tensor]:
    """Records of the label bytes and 3,072 pixels, plane after plane."""
    import torch

    record = version.label_bytes + _PIXELS
    if not data or len(data) % record:
        raise UnreadableArrays(f"its {len(data):,} bytes are not whole records of {record:,}")
    records = torch.frombuffer(data, dtype=torch.uint8).view(-1, record)
    return records[:, version.label_bytes :].reshape(-1, *SHAPE), records[:, version.label_bytes - 1].to(torch.int64)


def _read_python(version: _Version, data: bytearray) -> tuple[Tensor, Tensor]:
    """A pickled dict: `data`, an array of uint8 [N, 3072], and a list of N labels."""
    import torch

    content = read_arrays(data)
    array, labels = content.get("data"), content.get(version.label_key)
    if not isinstance(array, PickledArray) or not isinstance(labels, list):
        raise UnreadableArrays(f"it has no array `data`, or no list `{version.label_key}`")
    if not all(isinstance(label, int) and 0 <= label < version.classes for label in labels):
        raise UnreadableArrays(f"it has labels that are no whole numbers from 0 to {version.classes - 1}")
    if array.dtype not in ("u1", "|u1") or array.shape != (len(labels), _PIXELS):
        raise UnreadableArrays(f"its array is {array.dtype} {array.shape}, not bytes {(len(labels), _PIXELS)}")
    if len(array.data) != len(labels) * _PIXELS or not labels:
        raise UnreadableArrays(f"its array has {len(array.data):,} bytes for {array.shape}")
    return torch.frombuffer(bytearray(array.data), dtype=torch.uint8).view(-1, *SHAPE), torch.tensor(labels)


class PickledArray:
    """A numpy array as a pickle describes it: `data` are its elements of type `dtype`, in row-major order."""

    shape: object = ()
    dtype: object = ""
    data: bytes = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, by_columns, data = state
        if by_columns or not isinstance(data, str | bytes):
            raise ValueError("an array of an unknown layout")
        self.data = data.encode("latin-1") if isinstance(data, str) else data  # Python 2 wrote text


class _Dtype(str):
    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Byte order and field names: a type of single bytes has neither."""


def _encoded(text: str, _: str) -> bytes:
    return str.encode(text, "latin-1")  # refuses what is no text


class _ArrayUnpickler(pickle._Unpickler):
    """Reads dicts, lists, numbers, text and byte arrays, and can call nothing but the five functions below.

    The functions that numpy would run are replaced, so no code outside this file runs, whatever the pickle says. It is
    the unpickler in Python: the one in C allocates gigabytes for one damaged byte (the index of its memo).
    """

    def find_class(self, module: str, name: str) -> Any:
        replacements: Mapping[str, Callable[..., object]] = {
            "numpy.core.multiarray._reconstruct": lambda *_: PickledArray(),
            "numpy._core.multiarray._reconstruct": lambda *_: PickledArray(),
            "numpy.ndarray": lambda *_: None,
            "numpy.dtype": lambda name, *_: _Dtype(str.__str__(name)),
            "_codecs.encode": lambda *args: _encoded(*args),  # how Python 3 writes bytes in protocol 2
        }
        if f"{module}.{name}" not in replacements:
            raise UnreadableArrays(f"its pickle wants {module!r} {name!r}, which no data set needs: not opened")
        return replacements[f"{module}.{name}"]


def read_arrays(content: bytes | bytearray) -> dict[str, object]:
    """The dict that a pickle holds, with text keys: of lists, numbers, text and `PickledArray`.

    Raises:
        UnreadableArrays: it is damaged, or names anything but numpy's arrays.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # odd escapes in a damaged string
            found = _ArrayUnpickler(io.BytesIO(content), encoding="latin-1").load()
    except UnreadableArrays:
        raise
    except Exception as error:  # whatever damaged bytes make an unpickler raise
        raise UnreadableArrays(f"its pickle is damaged ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise UnreadableArrays("its pickle holds no dict")
    named = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in found.items()}
    return {key: value for key, value in named.items() if isinstance(key, str)}
