"""Folders of images, one per class, as ImageNet is kept: <root>/train/<class>/*.jpg and <root>/val/<class>/*.jpg."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .places import search
from .source import DataSource, require_integer

if TYPE_CHECKING:
    from .image_files import FolderSet

_SPLITS = {"train": ("train",), "valid": ("val", "valid", "validation"), "test": ("test",)}


def open_image_folder(
    root: str | Path | None = None,
    *,
    size: int = 224,
    resize: int | None = None,
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: tuple[float, float, float] = (0.229, 0.224, 0.225),
) -> FolderSet:
    """A folder with train/<class>/ and val/<class>/ (or valid, validation, test). Runs hold a tenth of train/ out where it
    is alone. Needs Pillow once images are read.

    Training: RandomResizedCrop to `size` and a flip. Evaluation: the shorter side to `resize` (by default size * 256 /
    224), then the centre. Both bilinear. Mean and standard deviation are ImageNet's.

    Raises:
        UsageError: no such folders.
    """
    from .image_files import FolderSet

    require_integer("size", size, 1, 1 << 14)
    resize = require_integer("resize", size * 256 // 224 if resize is None else resize, size, 1 << 14)
    folders = search("image-folder", root, ["imagenet"], _folders)
    return FolderSet("image-folder", folders, size=size, resize=resize, mean=tuple(mean), std=tuple(std))


IMAGE_FOLDER = DataSource(
    name="image-folder",
    kind="image",
    open=open_image_folder,
    summary="a folder of images per class (ImageNet)",
    can_hold_out=True,
    settings="imagenet",
    data_defaults={"workers": 8},
)
IMAGENET = DataSource(
    name="imagenet",
    kind="image",
    open=open_image_folder,
    summary="an image folder with ImageNet's size and classes",
    image=(3, 224, 224),
    classes=1000,
    samples=1_281_167,
    settings="imagenet",
    data_defaults={"workers": 8},
)


def _folders(root: Path) -> dict[str, Path] | None:
    found = {
        split: root / next(name for name in names if (root / name).is_dir())
        for split, names in _SPLITS.items()
        if any((root / name).is_dir() for name in names)
    }
    return found if "train" in found else None
