"""Data: real, made-up and one's own, opened by name; batches that are a function of (seed, epoch, step).

    dataset = open_data("cifar100", root)
    loader = Batches(dataset, "train", 128, seed=0, device="cuda")
    x, y = loader.batch(epoch=3, step=17)

One family of sets a file. Every random choice is a hash of its seed and its place (base/randomness.py), never of earlier
choices, so a resumed run continues bit for bit, in the middle of an epoch too, and any number of processes sees the same data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registry import DATASETS, open_data
from .source import DataSource

if TYPE_CHECKING:
    from .augment import Augment
    from .batches import Batches
    from .dataset import DataSet, Targets
    from .images import ImageSet
    from .token_files import write_tokens
    from .tokens import Stream, TokenSet

__all__ = [
    "DATASETS",
    "Augment",
    "Batches",
    "DataSet",
    "DataSource",
    "ImageSet",
    "Stream",
    "Targets",
    "TokenSet",
    "open_data",
    "write_tokens",
]

_NEED_TORCH = {
    "Augment": "augment",
    "Batches": "batches",
    "DataSet": "dataset",
    "ImageSet": "images",
    "Stream": "tokens",
    "Targets": "dataset",
    "TokenSet": "tokens",
    "write_tokens": "token_files",
}


def __getattr__(name: str) -> object:
    """Import what needs torch when it is first used: a recipe is checked without it."""
    from importlib import import_module

    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
