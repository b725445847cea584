"""Which samples make up a batch: a function of (seed, epoch, step), so a run goes on mid-epoch as if it never stopped."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.randomness import counters, key_of, words
from ..errors import UsageError
from .permutation import Permutation

CHUNK = 1 << 16  # samples whose order is worked out at a time: two tensors of 512 KB, and few launches on a GPU


class Order:
    """The batches of every epoch. `rank` of `world` processes takes its slice of each; together they are the whole batch.

    Training (`train`) shuffles anew each epoch and leaves out the last, incomplete batch; evaluation goes through 0, 1,
    2, ... and ends with a smaller one, of which a rank may get nothing.

    Raises:
        UsageError: a batch size that the ranks cannot share, or a set too small for one batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        *,
        train: bool,
        shuffle: bool | None = None,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= rank < world:
            raise UsageError(f"rank {rank} of {world} processes")
        if batch_size < 1 or (train and batch_size % world):
            raise UsageError(f"a batch of {batch_size} cannot be shared by {world} processes")
        if size < 1 or (train and size < batch_size):
            raise UsageError(
                f"{size} samples do not fill one batch of {batch_size}", hint="choose a smaller batch size"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.train, self.rank, self.world, self.device = train, rank, world, torch.device(device)
        self.shuffle = train if shuffle is None else shuffle
        self.steps = size // batch_size if train else -(-size // batch_size)
        self._chunk: tuple[int, int, Tensor, Tensor] | None = None

    def at(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """This rank's part of a batch: sample ids (int64 [b]) and a random word for each (int64 [b]), on the device.

        The word is a function of (seed, epoch, sample id): a sample is augmented in the same way whatever the batch
        size and the number of ranks.

        Raises:
            UsageError: no such step in an epoch.
        """
        if epoch < 0 or not 0 <= step < self.steps:
            raise UsageError(f"no step {step} in epoch {epoch}: an epoch has the steps 0 to {self.steps - 1}")
        per_chunk = max(1, CHUNK // self.batch_size)
        first = step // per_chunk * per_chunk * self.batch_size
        ids, random = self._stretch(epoch, first, min(self.size, first + per_chunk * self.batch_size))
        begin = step * self.batch_size
        rows = min(self.batch_size, self.size - begin)
        mine = slice(
            begin - first + rows * self.rank // self.world, begin - first + rows * (self.rank + 1) // self.world
        )
        return ids[mine], random[mine]

    def _stretch(self, epoch: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The ids and words of positions first..last-1 of an epoch; the last stretch asked for is kept."""
        if self._chunk is None or self._chunk[:2] != (epoch, first):
            ids = counters(first, last, self.device)
            if self.shuffle:
                ids = Permutation(self.size, key_of(self.seed, "order", epoch), self.device)(ids)
            self._chunk = (epoch, first, ids, words(key_of(self.seed, "sample", epoch), ids))
        return self._chunk[2], self._chunk[3]
