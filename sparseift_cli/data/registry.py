"""Data sets by name. Nothing here imports torch until one is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.registry import Registry
from .cifar import CIFAR10, CIFAR100
from .digits import DIGITS
from .image_folder import IMAGE_FOLDER, IMAGENET
from .mnist import MNIST
from .source import DataSource
from .stdlib import STDLIB
from .synthetic import SYNTHETIC_IMAGES, SYNTHETIC_TEXT
from .text import TEXT, WIKITEXT2, WIKITEXT103
from .token_files import TOKENS

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
            CIFAR10,
            CIFAR100,
            MNIST,
            DIGITS,
            IMAGE_FOLDER,
            SYNTHETIC_IMAGES,
            STDLIB,
            TEXT,
            WIKITEXT2,
            WIKITEXT103,
            TOKENS,
            SYNTHETIC_TEXT,
            IMAGENET,
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
