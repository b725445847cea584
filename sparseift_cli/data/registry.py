"""Data sets by name. Nothing here imports torch until one is opened."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from .dataset import DataSet


@dataclass(frozen=True, slots=True)
class Entry:
    """A data set that can be opened: `module.function` does it."""

    module: str
    function: str
    kind: Literal["image", "tokens"]
    summary: str


CATALOG = {
    "cifar10": Entry("cifar", "open_cifar10", "image", "60,000 photographs of 32 x 32, 10 classes"),
    "cifar100": Entry("cifar", "open_cifar100", "image", "60,000 photographs of 32 x 32, 100 classes"),
    "mnist": Entry("mnist", "open_mnist", "image", "70,000 handwritten digits of 28 x 28"),
    "digits": Entry("digits", "open_digits", "image", "1,797 handwritten digits of 8 x 8, from scikit-learn"),
    "image-folder": Entry("image_folder", "open_image_folder", "image", "a folder of images per class (ImageNet)"),
    "synthetic-images": Entry("synthetic", "open_synthetic_images", "image", "made-up images of any size"),
    "stdlib": Entry("stdlib", "open_stdlib", "tokens", "Python's own sources, by bytes: real text on every machine"),
    "text": Entry("text", "open_text", "tokens", "text files, by bytes or words"),
    "wikitext-2": Entry("text", "open_wikitext2", "tokens", "WikiText-2, by words"),
    "wikitext-103": Entry("text", "open_wikitext103", "tokens", "WikiText-103, by words"),
    "tokens": Entry("token_files", "open_tokens", "tokens", "token files made elsewhere, memory-mapped"),
    "synthetic-text": Entry("synthetic", "open_synthetic_text", "tokens", "a Markov chain of 1.75 bits a token"),
}


def open_data(name: str, root: str | Path | None = None, **options: Any) -> DataSet:
    """The data set called `name` (case, dashes and underscores never matter), found below `root`.

    Without a root it is looked for in $SPARSEIFT_DATA, else ~/.cache/sparseift. `options` are those of the function in
    `CATALOG`: `download` for CIFAR and MNIST, `level` for text, `size` for image folders, ...

    Raises:
        UsageError: an unknown name or option, or a set that is not there or damaged.
    """
    entry = CATALOG[find(name)]
    opener: Callable[..., DataSet] = getattr(import_module(f"{__package__}.{entry.module}"), entry.function)
    known = [option for option in inspect.signature(opener).parameters if option != "root"]
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known) or (f"it takes {', '.join(known)}" if known else "it takes none")
            raise UsageError(f"the data set {find(name)} has no option {option!r}", hint=hint)
    return opener(root, **options)


def find(name: str) -> str:
    """The proper name of a data set. Raises UsageError for one that there is not."""
    squeezed = {_squeezed(known): known for known in CATALOG}
    found = squeezed.get(_squeezed(name))
    if found is None:
        near = did_you_mean(name, CATALOG)
        known = f"there are {', '.join(CATALOG)}"
        raise UsageError(f"no data set is called '{name}'", hint=f"{near} {known}" if near else known)
    return found


def _squeezed(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))
