"""The batches of a split, each a function of (seed, epoch, step): `Batches(dataset, "train", 128).batch(epoch, step)`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ..errors import UsageError
from .augment import Augment
from .dataset import Assembly, BatchSettings, DataSet, Targets
from .source import require_integer


class Batches:
    """Batches (x, y) of one split on `device`, for this rank.

    Images: x float [b, C, H, W], normalised; y int64 [b]. Tokens: x, y int64 [b, seq], y one token later and -100 where
    there is none. Training batches all have batch_size / world rows. In evaluation the last batch may be smaller, and
    empty on some ranks: add up losses, do not average averages.

    Args:
        batch_size: of all ranks together; a multiple of `world` for training.
        train: shuffled and augmented, incomplete batches left out; by default the split called train.
        augment: "default" is what the set names for training, and nothing for evaluation.
        seq: tokens in a row, for token sets only.
        workers: processes that decode, for image folders only; 0 decodes here.
        limit: use only the first so many images, or windows of `seq` tokens, of the split.
        dtype: of images.
        channels_last: memory format of images.

    Raises:
        UsageError: arguments that do not fit each other or the set, and files of the set that are damaged.
    """

    def __init__(
        self,
        dataset: DataSet,
        split: str,
        batch_size: int,
        seed: int = 0,
        *,
        train: bool | None = None,
        augment: Augment | Literal["default"] | None = "default",
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        seq: int | None = None,
        workers: int = 0,
        limit: int | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        dataset.check_split(split)
        train = split == "train" if train is None else train
        if (dataset.kind == "tokens") != (seq is not None):
            tokens = dataset.kind == "tokens"
            raise UsageError(
                f"{dataset.name} needs a sequence length" if tokens else f"{dataset.name} has no sequence length",
                hint="give seq" if tokens else "leave out seq",
            )
        if augment == "default":
            augment = dataset.augment if train else None
        self.dataset, self.split, self.train, self.batch_size, self.seed = dataset, split, train, batch_size, seed
        self._loader = dataset.loader(
            BatchSettings(
                split,
                require_integer("batch_size", batch_size, 1, 1 << 31),
                seed,
                train,
                augment,
                torch.device(device),
                rank,
                world,
                None if seq is None else require_integer("seq", seq, 1, 1 << 31),
                require_integer("workers", workers, 0, 1 << 10),
                None if limit is None else require_integer("limit", limit, 1, 1 << 62),
                dtype,
                channels_last,
            )
        )

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch, the same on every rank."""
        return self._loader.steps

    @property
    def targets(self) -> Targets:
        """The targets that one epoch predicts, counted over all ranks; divide summed losses by this."""
        return self._loader.targets

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Batch `step` of `epoch`, both counted from 0, without those before it. Raises UsageError beyond the epoch."""
        return self._loader.batch(epoch, step)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step counted over the whole run."""
        return self.batch(*divmod(step, self.steps_per_epoch))

    @property
    def assembly(self) -> Assembly | None:
        """How batches are made on the device, where it holds the whole split; else None."""
        return self._loader.assembly

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from step `start` on."""
        for step in range(start, self.steps_per_epoch):
            yield self.batch(epoch, step)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch 0: an evaluation's, whose epochs are all alike."""
        return self.epoch(0)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def close(self) -> None:
        """End worker processes; a later batch starts them again."""
        self._loader.close()
