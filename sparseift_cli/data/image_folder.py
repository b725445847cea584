"""Folders of images, one per class, as ImageNet is kept: <root>/train/<class>/*.jpg and <root>/val/<class>/*.jpg."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path

from ..errors import UsageError
from .archives import read_file
from .augment import Augment
from .dataset import DataSet, Request, whole
from .folder_loader import FolderLoader
from .places import search

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_SPLITS = {"train": ("train",), "valid": ("val", "valid", "validation"), "test": ("test",)}
_READ_WHOLE = 1 << 30  # bytes: up to here the hash is one of contents


class FolderSet(DataSet):
    """Image files [3, size, size] once decoded, labelled by the alphabetical place of their class folder."""

    kind = "image"

    def __init__(
        self, name: str, folders: dict[str, Path], *, size: int, resize: int,
        mean: tuple[float, ...], std: tuple[float, ...],
    ) -> None:  # fmt: skip
        self.name, self.source = name, str(next(iter(folders.values())).parent)
        self.shape, self.resize, self.mean, self.std = (3, size, size), resize, mean, std
        self.augment = Augment()
        self.split_names, self._folders = tuple(folders), folders
        self._classes = sorted(entry.name for entry in os.scandir(folders["train"]) if entry.is_dir())
        self.classes = len(self._classes)
        self._held: dict[str, list[tuple[str, int]]] = {}
        if not self._classes:
            raise UsageError(f"{folders['train']}: holds no folder for any class")

    def files(self, split: str) -> list[tuple[str, int]]:
        """Path and label of every image of a split, sorted by class and path.

        Raises:
            UsageError: a class that the training split does not have, or no images.
        """
        if split not in self._held:
            folder = self._folders[split]
            labels = {name: label for label, name in enumerate(self._classes)}
            found: list[tuple[str, int]] = []
            for entry in sorted((e for e in os.scandir(folder) if e.is_dir()), key=lambda e: e.name):
                if entry.name not in labels:
                    raise UsageError(f"{entry.path}: the training split has no class of this name")
                found += [(path, labels[entry.name]) for path in _images(entry.path)]
            if not found:
                raise UsageError(f"{folder}: holds no images in its class folders")
            self._held[split] = found
        return self._held[split]

    def _size(self, split: str) -> int:
        return len(self.files(split))

    @cached_property
    def _nbytes(self) -> int:
        return sum(Path(path).stat().st_size for split in self.split_names for path, _ in self.files(split))

    @property
    def hashed(self) -> str:
        """Contents up to 1 GiB. Beyond it, names and sizes: ImageNet's 150 GB would take longer than its first steps."""
        return "content" if self._nbytes <= _READ_WHOLE else "names and sizes"

    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for split in self.split_names:
            for path, label in self.files(split):
                name = Path(path).relative_to(self._folders[split]).as_posix()
                digest.update(f"{split}/{name} {label} {Path(path).stat().st_size}\n".encode())
                if self.hashed == "content":
                    digest.update(read_file(Path(path), _READ_WHOLE))
        return digest.hexdigest()

    def loader(self, request: Request) -> FolderLoader:
        files = self.files(request.split)[: request.limit]
        return FolderLoader(files, request, size=self.shape[1], resize=self.resize, mean=self.mean, std=self.std)


def open_image_folder(
    root: str | Path | None = None, *, size: int = 224, resize: int | None = None,
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406), std: tuple[float, float, float] = (0.229, 0.224, 0.225),
) -> FolderSet:  # fmt: skip
    """A folder with train/<class>/ and val/<class>/ (or valid, validation, test). Needs Pillow once images are read.

    Training: RandomResizedCrop to `size` and a flip. Evaluation: the shorter side to `resize` (by default size * 256 /
    224), then the centre. Both bilinear. Mean and standard deviation are ImageNet's.

    Raises:
        UsageError: no such folders.
    """
    whole("size", size, 1, 1 << 14)
    resize = whole("resize", size * 256 // 224 if resize is None else resize, size, 1 << 14)
    folders = search("image-folder", root, ["imagenet"], _folders)
    return FolderSet("image-folder", folders, size=size, resize=resize, mean=tuple(mean), std=tuple(std))


def _folders(root: Path) -> dict[str, Path] | None:
    found = {
        split: root / next(name for name in names if (root / name).is_dir())
        for split, names in _SPLITS.items()
        if any((root / name).is_dir() for name in names)
    }
    return found if "train" in found else None


def _images(folder: str) -> list[str]:
    """Image files at any depth below a folder, sorted."""
    found: list[str] = []
    for parent, _, names in os.walk(folder):
        # As strings: a Path for each of 1.3 million files takes seconds.
        found += [f"{parent}/{name}" for name in names if name[name.rfind(".") :].lower() in SUFFIXES]
    return sorted(found)
