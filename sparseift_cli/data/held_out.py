"""A part of the training images kept aside, so that what is chosen by accuracy is not chosen on the test split."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from ..randomness import key_of
from .images import ImageSet
from .permutation import Permutation


def hold_out(dataset: ImageSet, count: int) -> ImageSet:
    """The same set with a split `valid`: `count` of its training images, drawn once for all seeds and runs.

    Reads the training images, which then lie in memory twice.

    Raises:
        UsageError: it has a split called valid already, or not so many training images.
    """
    if "valid" in dataset.split_names:
        raise UsageError(f"{dataset.name} has a validation split of its own", hint="leave out data.validation")
    size = len(dataset.images("train")[1])
    if not 0 < count < size:
        raise UsageError(f"{count} of {size} training images of {dataset.name} cannot be held out",
                         hint="choose another data.validation")  # fmt: skip
    drawn = Permutation(size, key_of(0, dataset.name, "held out"))(torch.arange(count))
    held = torch.zeros(size, dtype=torch.bool).index_fill_(0, drawn, True)

    def read(split: str) -> tuple[Tensor, Tensor]:
        if split not in ("train", "valid"):
            return dataset.images(split)
        images, labels = dataset.images("train")
        wanted = held if split == "valid" else ~held
        return images[wanted], labels[wanted]

    channels, height, width = dataset.shape
    others = [name for name in dataset.split_names if name != "train"]
    return ImageSet(
        dataset.name, read, split_names=("train", "valid", *others), shape=(channels, height, width),
        classes=dataset.classes, source=dataset.source, mean=dataset.mean, std=dataset.std, augment=dataset.augment,
    )  # fmt: skip
