"""MNIST in the idx format of its authors (LeCun, Cortes, Burges), plain or .gz; sets in the same form read too."""

from __future__ import annotations

from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .places import Remote, read_file, search
from .source import DataSource

if TYPE_CHECKING:
    from torch import Tensor

    from .images import ImageSet

_LIMIT = 64 << 20  # the training images unpack to 47 MB
_SITE = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_REMOTES = (
    Remote(f"{_SITE}train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
    Remote(f"{_SITE}train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
    Remote(f"{_SITE}t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
    Remote(f"{_SITE}t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", 4_542),
)
_PREFIX = {"train": "train", "test": "t10k"}


def open_mnist(root: str | Path | None = None, *, download: bool = False) -> ImageSet:
    """MNIST: 60,000 and 10,000 images [1, 28, 28] of 10 digits. Raises UsageError where it is not there."""
    from .images import ImageSet

    folder = search("mnist", root, ["mnist", "MNIST/raw"], _recognise, remotes=_REMOTES, download=download)
    return ImageSet(
        "mnist",
        partial(_read, folder),
        split_names=tuple(_PREFIX),
        shape=(1, 28, 28),
        classes=10,
        source=str(folder),
        mean=(0.1307,),
        std=(0.3081,),
    )


MNIST = DataSource(
    name="mnist",
    kind="image",
    open=open_mnist,
    summary="70,000 handwritten digits of 28 x 28",
    image=(1, 28, 28),
    classes=10,
    samples=60_000,
    splits=tuple(_PREFIX),
    can_hold_out=True,
)


def _recognise(folder: Path) -> Path | None:
    return folder if folder.is_dir() and _file(folder, "t10k", "images", 3) else None


def _file(folder: Path, prefix: str, what: str, dims: int) -> Path | None:
    names = [f"{prefix}-{what}{sep}idx{dims}-ubyte{end}" for sep in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    parts: list[Tensor] = []
    for what, dims in (("images", 3), ("labels", 1)):
        path = _file(folder, _PREFIX[split], what, dims)
        if path is None:
            raise UsageError(f"{folder / _PREFIX[split]}-{what}-idx{dims}-ubyte: not there, nor with .gz")
        parts.append(read_idx(path, dims))
    return parts[0][:, None], parts[1]


def read_idx(path: Path, dims: int) -> Tensor:
    """The uint8 tensor [sizes] of `dims` dimensions in an idx file: 00 00 08 dims, the sizes as big-endian int32, the bytes.

    Raises:
        UsageError: another type or number of dimensions, or not exactly as many bytes as the sizes say.
    """
    import torch

    data = read_file(path, _LIMIT)
    begin = 4 + 4 * dims
    if len(data) < begin or bytes(data[:4]) != bytes([0, 0, 8, dims]):
        raise UsageError(f"{path}: no idx file of bytes in {dims} dimensions")
    sizes = [int.from_bytes(data[4 + 4 * d : 8 + 4 * d], "big") for d in range(dims)]
    if len(data) - begin != prod(sizes) or not prod(sizes):
        shape = " x ".join(map(str, sizes))
        raise UsageError(f"{path}: {len(data) - begin:,} bytes for {shape}", hint="delete it and fetch it again")
    return torch.frombuffer(data, dtype=torch.uint8, offset=begin).view(sizes)
