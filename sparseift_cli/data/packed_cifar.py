"""CIFAR-100 as some share it in little space: planes-*.xz, 101 MB for 184 MB of images, without loss.

A part is an .xz of residuals [3, N, 32, 32]: planes G, R - G, B - G, each predicted pixel by pixel from its left, upper
and upper left neighbours (the median edge detector of JPEG-LS), modulo 256. labels.npz has the labels of both splits.
"""

from __future__ import annotations

import ast
import lzma
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError

_PARTS = {"train": ("planes-train-0.xz", "planes-train-1.xz"), "test": ("planes-test.xz",)}
_SIDE = 32
_LARGEST = 50_000 * 3 * _SIDE * _SIDE
_AT_A_TIME = 5_000  # images whose planes stay in the processor's caches


def is_packed(folder: Path) -> bool:
    """Does the folder hold the test split in this form?"""
    return (folder / _PARTS["test"][0]).is_file() and (folder / "labels.npz").is_file()


def read_packed(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """uint8 images [N, 3, 32, 32] and fine labels [N]; training parts that are not there are left out.

    Raises:
        UsageError: damaged files.
    """
    labels = _labels(folder / "labels.npz", f"fine_{split}")
    per_part = len(labels) // len(_PARTS[split])
    images: list[Tensor] = []
    kept: list[Tensor] = []
    for index, name in enumerate(_PARTS[split]):
        path = folder / name
        if not path.is_file():
            continue
        residuals = _unpacked(path)
        if residuals.shape[1] != per_part:
            raise UsageError(f"{path}: {residuals.shape[1]} images for {per_part} labels")
        images += [_decoded(part) for part in residuals.split(_AT_A_TIME, dim=1)]
        kept.append(labels[index * per_part : (index + 1) * per_part])
    if not images:
        raise UsageError(f"{folder}: none of {', '.join(_PARTS[split])} is there")
    return torch.cat(images), torch.cat(kept)


def _unpacked(path: Path) -> Tensor:
    """Residuals uint8 [3, N, 32, 32]."""
    try:
        unpacker = lzma.LZMADecompressor()
        data = bytearray(unpacker.decompress(path.read_bytes(), max_length=_LARGEST))
    except lzma.LZMAError as error:
        raise UsageError(f"{path}: damaged ({error})") from None
    if not unpacker.eof or not data or len(data) % (3 * _SIDE * _SIDE):
        raise UsageError(f"{path}: damaged (it does not hold whole images)")
    return torch.frombuffer(data, dtype=torch.uint8).view(3, -1, _SIDE, _SIDE)


def _decoded(residuals: Tensor) -> Tensor:
    """Images uint8 [n, 3, 32, 32] of residuals [3, n, 32, 32]; pixels lead while they are decoded one after the other."""
    rest = residuals.permute(0, 2, 3, 1).to(torch.int16).contiguous()
    green = _plane(rest[0], None)
    red, blue = (_plane(rest[k], green) + green for k in (1, 2))
    return torch.stack([red, green, blue]).permute(3, 0, 1, 2).to(torch.uint8).contiguous()


def _plane(rest: Tensor, base: Tensor | None) -> Tensor:
    """One plane int16 [32, 32, n]: pixels, or with `base` their differences from it, which is added before the modulo."""
    plane = torch.empty_like(rest)
    for i in range(_SIDE):
        for j in range(_SIDE):
            value = rest[i, j] + _predicted(plane, i, j)
            if base is None:
                plane[i, j] = value & 255
            else:
                plane[i, j] = (value + base[i, j] & 255) - base[i, j]
    return plane


def _predicted(plane: Tensor, i: int, j: int) -> Tensor | int:
    if i == 0:
        return plane[0, j - 1] if j else 0
    up = plane[i - 1, j]
    if j == 0:
        return up
    left, corner = plane[i, j - 1], plane[i - 1, j - 1]
    # The median of left, up and left + up - corner.
    low, high = torch.minimum(left, up), torch.maximum(left, up)
    return torch.maximum(low, torch.minimum(high, left + up - corner))


def _labels(path: Path, name: str) -> Tensor:
    """A one-dimensional array of bytes out of an .npz: a zip of .npy files, each with a Python literal for a header."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            data = file.read(1 << 20)
        begin = 10 + int.from_bytes(data[8:10], "little")
        header = ast.literal_eval(data[10:begin].decode("latin-1"))
        (count,) = header["shape"]
        if data[:8] != b"\x93NUMPY\x01\x00" or header["descr"] != "|u1" or len(data) != begin + count:
            raise ValueError("not an array of bytes")
    except (OSError, KeyError, ValueError, SyntaxError, TypeError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: damaged ({error})") from None
    return torch.frombuffer(bytearray(data[begin:]), dtype=torch.uint8)
