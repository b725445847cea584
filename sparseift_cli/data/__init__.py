"""Data: real, made-up and one's own, opened by name; batches that are a function of (seed, epoch, step).

    dataset = open_data("cifar100", root)
    loader = Batches(dataset, "train", 128, seed=0, device="cuda")
    x, y = loader.batch(epoch=3, step=17)

One family of sets a file. What is drawn at random is a hash of what it is drawn for (randomness.py), never of what was
drawn before, so a run resumes mid-epoch to the bit and sees the same data on any number of processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registry import CATALOG, find, open_data

if TYPE_CHECKING:
    from .augment import Augment
    from .batches import Batches
    from .dataset import DataSet, Targets
    from .token_files import write_tokens

__all__ = ["CATALOG", "Augment", "Batches", "DataSet", "Targets", "find", "open_data", "write_tokens"]

_NEED_TORCH = {
    "Augment": "augment",
    "Batches": "batches",
    "DataSet": "dataset",
    "Targets": "dataset",
    "write_tokens": "token_files",
}


def __getattr__(name: str) -> object:
    """What needs torch is imported when it is used: a recipe is checked without it."""
    from importlib import import_module

    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
