"""What a data set is: its shapes, its splits, where it came from and the hash of what is in it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import floor
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import UsageError, one_of
from .augment import Augment
from .order import permutation

Kind = Literal["image", "tokens"]


@dataclass(frozen=True, slots=True)
class Targets:
    """What an evaluation over a whole split predicts, for perplexity per token or word and bits per byte.

    None where the split does not know. Images: `tokens` is their number.
    """

    tokens: int
    words: int | None = None  # as WikiText counts: words between spaces, and one for every end of line
    bytes: int | None = None  # of the text


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """What `Batches` was asked for, checked."""

    split: str
    batch_size: int
    seed: int
    train: bool
    augment: Augment | None
    device: torch.device
    rank: int = 0
    world: int = 1
    seq: int | None = None
    workers: int = 0
    limit: int | None = None
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


class Assembly(Protocol):
    """Makes batches of a split that the device holds; nothing is copied there."""

    def picks(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Sample ids and random words, int64 [b]: what `assemble` needs to know of a batch."""
        ...

    def assemble(self, ids: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
        """The batch x, y of these picks, [b, C, H, W] and [b], or [b, seq] both: tensor operations alone, fit for torch.compile
        and for a CUDA graph.
        """
        ...


class Loader(Protocol):
    """Makes the batches of one split."""

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        ...

    @property
    def targets(self) -> Targets:
        """What one epoch predicts, over all ranks."""
        ...

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch of this rank on the device: x [b, C, H, W] and y [b] of images, x and y [b, seq] of tokens."""
        ...

    @property
    def assembly(self) -> Assembly | None:
        """How batches are made on the device, where it holds the whole split; else None."""
        ...

    def close(self) -> None:
        """Let go of worker processes."""
        ...


class DataSet(ABC):
    """A data set on disk or made up. Opening it finds its files; a split is read when it is first asked for, and kept."""

    name: str
    kind: Kind
    source: str  # the file or folder, or how it was made
    shape: tuple[int, ...]  # of one sample: (channels, height, width), or () for tokens
    classes: int  # labels of images, or the size of the vocabulary
    mean: tuple[float, ...] = ()  # of each channel of images, in units of the full range
    std: tuple[float, ...] = ()
    augment: Augment | None = None  # what training does to its images where nothing else is said
    split_names: tuple[str, ...]
    drawn_from_training: str = ""  # where the split valid is a part of the files' training split: which part, in words

    @cached_property
    def splits(self) -> Mapping[str, int]:
        """Images, or tokens, in every split. Reads them."""
        return {name: self._size(name) for name in self.split_names}

    @property
    def held_out(self) -> str:
        """The split to watch during training: valid where there is one, else test.

        Raises:
            UsageError: there is neither; what is measured on training data is no result.
        """
        found = next((name for name in ("valid", "test") if name in self.split_names), None)
        if found is None:
            raise UsageError(
                f"{self.name} ({self.source}) has only the split {', '.join(self.split_names)}: nothing is held out to "
                "measure on",
                hint="add a split valid or test; data.validation=0.1 holds a part out of a set that can be divided",
            )
        return found

    def with_validation(self, share: float) -> DataSet:
        """The same set with a split valid that is `share` of its training split, drawn once for all seeds and runs.

        Raises:
            UsageError: it has such a split already, or this kind of set cannot be divided.
        """
        raise UsageError(
            f"{self.name}: a {type(self).__name__} has no part of its training split to hold out",
            hint="give it a split valid, or define with_validation",
        )

    def require_no_validation(self) -> None:
        """Raise UsageError where there is a split valid already."""
        if "valid" in self.split_names:
            raise UsageError(f"{self.name} has a validation split of its own", hint="leave out data.validation")

    def repeats(self, split: str) -> int:
        """How many samples of `split` are in the training split too, byte for byte; 0 where that was not looked for."""
        return 0

    @property
    def hashed(self) -> str:
        """What `sha256` is a hash of."""
        return "content"

    @cached_property
    def sha256(self) -> str:
        """Hash of what `hashed` names, independent of the container that it came in. Reads every split."""
        return self._sha256()

    @abstractmethod
    def _sha256(self) -> str: ...

    @abstractmethod
    def _size(self, split: str) -> int: ...

    @abstractmethod
    def loader(self, settings: BatchSettings) -> Loader:
        """What makes the batches that `settings` describes."""

    def describe(self) -> dict[str, object]:
        """Plain data for provenance.json. Reads every split, for the hash."""
        return {
            "name": self.name,
            "kind": self.kind,
            "source": self.source,
            "shape": list(self.shape),
            "classes": self.classes,
            "splits": dict(self.splits),
            "sha256": self.sha256,
            "hashed": self.hashed,
        }

    def check_split(self, split: str) -> None:
        """Raise UsageError unless there is such a split."""
        one_of(f"split of {self.name}", split, self.split_names)


def stratified_draw(labels: Tensor, count: int, *names: str) -> Tensor:
    """`count` of N samples, drawn once (`names` seed it): a mask bool [N] of labels int64 [N].

    Every class gives its share, rounded by largest remainder, and keeps at least one sample as long as another can give.
    """
    sizes = labels.bincount().tolist()
    shares = [Fraction(count * size, len(labels)) for size in sizes]
    counts = [floor(share) for share in shares]

    def last_to_give(label: int) -> tuple[bool, Fraction]:
        return counts[label] + 1 >= sizes[label], counts[label] - shares[label]

    for label in sorted((c for c, size in enumerate(sizes) if size), key=last_to_give)[: count - sum(counts)]:
        counts[label] += 1
    order = permutation(len(labels), *names, "held out")
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label, wanted in enumerate(counts):
        drawn[order[labels[order] == label][:wanted]] = True
    return drawn


def hash_tensors(parts: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes, element types and bytes of tensors [*], which may be memory-mapped: nothing is copied."""
    digest = hashlib.sha256()
    for name, tensor in parts:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor [*]."""
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


def fits_on(device: torch.device, nbytes: int) -> bool:
    """Whether `device` may hold a set of `nbytes` for the whole run: at most a quarter of what a GPU has free."""
    if device.type != "cuda":
        return device.type == "cpu"
    return nbytes <= torch.cuda.mem_get_info(device)[0] // 4
