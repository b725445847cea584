"""Data sets by name. Nothing here imports torch until one is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.registry import Registry
from . import cifar, digits, image_folder, mnist, stdlib, synthetic, text, token_files
from .source import DataSource

if TYPE_CHECKING:
    from .dataset import DataSet


def _not_a_source(entry: object) -> str | None:
    return None if isinstance(entry, DataSource) else f"it is a {type(entry).__name__}, not a DataSource"


DATASETS: Registry[DataSource] = Registry(
    "data set",
    "data",
    {
        source.name: source
        for source in (
            cifar.CIFAR10,
            cifar.CIFAR100,
            mnist.MNIST,
            digits.DIGITS,
            image_folder.IMAGE_FOLDER,
            synthetic.SYNTHETIC_IMAGES,
            stdlib.STDLIB,
            text.TEXT,
            text.WIKITEXT2,
            text.WIKITEXT103,
            token_files.TOKENS,
            synthetic.SYNTHETIC_TEXT,
            image_folder.IMAGENET,
        )
    },
    check=_not_a_source,
)
"""Every data set; installed packages add theirs by entry points `sparseift.data`."""


def open_data(name: str, root: str | Path | None = None, **options: Any) -> DataSet:
    """The data set called `name` (case, dashes and underscores never matter) or `package.module:Name`, found below `root`.

    Without a root it is looked for in $SPARSEIFT_DATA, else ~/.cache/sparseift. `options` are those of its opener:
    `download` for CIFAR and MNIST, `level` for text, `size` for image folders, ...

    Raises:
        UsageError: an unknown name or option, or a set that is not there or damaged.
    """
    source = DATASETS.get(name)
    source.require_options(options)
    return source.open(root, **options)
