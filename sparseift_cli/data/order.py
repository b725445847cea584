"""Which samples make up a batch: a function of (seed, epoch, step), so a run goes on mid-epoch as if it never stopped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from ..base.randomness import counters, generator_for, key_of, words
from ..errors import UsageError

CHUNK = 1 << 16  # samples whose words are computed at a time: two tensors of 512 KB, and few launches on a GPU
VERSION = "randperm"
"""How an epoch is shuffled. A checkpoint names it: a run does not go on in another order than it began in."""


def permutation(n: int, *names: str | int, seed: int = 0) -> Tensor:
    """A permutation of 0..n-1, int64 [n], that depends on `seed` and `names` alone: drawn by a generator of its own."""
    return torch.randperm(n, generator=generator_for(seed, *names))


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
        self._epoch: tuple[int, Tensor] | None = None

    def at(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """This rank's part of a batch: sample ids (int64 [b]) and a random word for each (int64 [b]), on the device.

        The word is a function of (seed, epoch, sample id): a sample is augmented in the same way whatever the batch
        size and the number of ranks.

        Raises:
            UsageError: no such step in an epoch.
        """
        if epoch < 0 or not 0 <= step < self.steps:
            raise UsageError(f"no step {step} in epoch {epoch}: an epoch has the steps 0 to {self.steps - 1}")
        # Whole batches are computed together, CHUNK samples or one batch at a time, and kept for the steps that follow.
        per_chunk = max(1, CHUNK // self.batch_size)
        first = step // per_chunk * per_chunk * self.batch_size
        ids, random = self._positions(epoch, first, min(self.size, first + per_chunk * self.batch_size))
        begin = step * self.batch_size
        rows = min(self.batch_size, self.size - begin)
        mine = slice(
            begin - first + rows * self.rank // self.world, begin - first + rows * (self.rank + 1) // self.world
        )
        return ids[mine], random[mine]

    def _positions(self, epoch: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Sample ids and words, int64 [last - first], at positions first..last-1 of an epoch; the last call's are kept."""
        if self._chunk is None or self._chunk[:2] != (epoch, first):
            ids = self._shuffled(epoch)[first:last] if self.shuffle else counters(first, last, self.device)
            self._chunk = (epoch, first, ids, words(key_of(self.seed, "sample", epoch), ids))
        return self._chunk[2], self._chunk[3]

    def _shuffled(self, epoch: int) -> Tensor:
        """The sample ids of an epoch, int64 [size], on the device."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = permutation(self.size, "order", epoch, seed=self.seed)
            if (
                self.device.type == "cuda"
            ):  # a copy from other memory would wait for everything that the GPU still has to do
                order = order.pin_memory()
            self._epoch = (epoch, order.to(self.device, non_blocking=True))
        return self._epoch[1]


class InMemoryLoader(ABC):
    """Batches of a split that is in memory: the samples of `_order`, put together by `assemble`."""

    _order: Order
    _resident: bool
    """The device holds the whole split."""

    @property
    def assembly(self) -> Self | None:
        """How batches are made on the device, where it holds the whole split; else None."""
        return self if self._resident else None

    def picks(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Sample ids and random words, int64 [b], of a batch."""
        return self._order.at(epoch, step)

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs x and targets y of this rank's batch, on the device.

        Images: x [b, C, H, W], y [b]. Tokens: x and y [b, seq].
        """
        return self.assemble(*self.picks(epoch, step))

    @abstractmethod
    def assemble(self, ids: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
        """The batch x, y of sample ids [b] and random words [b]."""

    def close(self) -> None:  # noqa: B027 (nothing to do, and no subclass has to)
        """There are no worker processes to end."""
