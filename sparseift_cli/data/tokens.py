"""Streams of tokens, in memory or memory-mapped: windows at random places for training, every token once for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..base.randomness import below, counters
from ..errors import UsageError
from .dataset import BatchSettings, DataSet, Targets, fits_on, hash_tensors, raw_bytes
from .order import InMemoryLoader, Order

IGNORE = -100  # the target of what is no token: cross_entropy leaves it out by default
_SEARCHED = 1 << 28  # bytes of a stream: up to here it is looked for in another one
# Unsigned 16- and 32-bit files are held as the signed type of the same size: torch indexes those everywhere.
BITS = {torch.uint8: 0xFF, torch.int16: 0xFFFF, torch.int32: 0xFFFFFFFF, torch.int64: (1 << 63) - 1}


@dataclass(frozen=True, slots=True)
class Stream:
    """The tokens of a split, one after the other: uint8, or int16 and int32 whose bits are read as unsigned, [N].

    `words` and `bytes` count the text that all tokens but the first stand for: the first is never predicted. `part(n)` counts
    both of the first n tokens, for evaluations of a part. They are asked for when an evaluation starts.
    """

    tokens: Tensor
    words: Callable[[], int | None] = lambda: None
    bytes: Callable[[], int | None] = lambda: None
    part: Callable[[int], tuple[int | None, int | None]] = lambda n: (None, None)


class TokenSet(DataSet):
    """Token streams that `read(split)` gives. `vocabulary` lists the words where the set has them."""

    kind = "tokens"
    shape = ()
    trained_vocabulary = False  # of subwords, and data.max_vocab makes it smaller

    def __init__(
        self,
        name: str,
        read: Callable[[str], Stream],
        *,
        split_names: Sequence[str],
        vocab: int,
        source: str,
        vocabulary: Sequence[str] | None = None,
    ) -> None:
        self.name, self.source, self.classes, self.vocabulary = name, source, vocab, vocabulary
        self.split_names, self._read = tuple(split_names), read
        self._held: dict[str, Stream] = {}

    @property
    def vocab(self) -> int:
        """Size of the vocabulary: ids are 0 to vocab - 1."""
        return self.classes

    def stream(self, split: str) -> Stream:
        """The tokens of a split, read or mapped once."""
        if split not in self._held:
            self._held[split] = self._read(split)
        return self._held[split]

    def with_validation(self, share: float) -> TokenSet:
        """The same set, with the last `share` of its training tokens as the split valid."""
        self.require_no_validation()
        tokens = self.stream("train").tokens
        cut = len(tokens) - round(share * len(tokens))
        if not 1 < cut < len(tokens) - 1:
            raise UsageError(f"{self.name}: {len(tokens)} training tokens are too few to hold {share:g} of them out")

        def read(split: str) -> Stream:
            if split not in ("train", "valid"):
                return self.stream(split)
            return Stream(tokens[:cut] if split == "train" else tokens[cut:])

        divided = TokenSet(
            self.name,
            read,
            split_names=("train", "valid", *(name for name in self.split_names if name != "train")),
            vocab=self.vocab,
            source=self.source,
            vocabulary=self.vocabulary,
        )
        divided.drawn_from_training = f"the last {len(tokens) - cut:,} of its {len(tokens):,} training tokens"
        return divided

    def repeats(self, split: str) -> int:
        """All or none: whether the whole split is a stretch of the training text."""
        train, other = self.stream("train").tokens, self.stream(split).tokens
        if train.dtype != other.dtype or max(train.nbytes, other.nbytes) > _SEARCHED:
            return 0
        return len(other) if bytes(raw_bytes(other)) in bytes(raw_bytes(train)) else 0

    def _sha256(self) -> str:
        """The hash reads every token anyway: so this is where ids beyond the vocabulary are found."""
        for name in self.split_names:
            narrow = BITS[self.stream(name).tokens.dtype] < self.vocab
            if not narrow and (largest := self._largest[name]) >= self.vocab:
                raise UsageError(f"{self.source}: a token {largest} in {name}; the vocabulary has {self.vocab}")
        return hash_tensors((name, self.stream(name).tokens) for name in self.split_names)

    @cached_property
    def largest(self) -> int:
        """The largest id in any split. Reads every token, once."""
        return max(self._largest.values())

    @cached_property
    def _largest(self) -> dict[str, int]:
        return {
            name: max(
                int((part.to(torch.int64) & BITS[part.dtype]).max()) for part in self.stream(name).tokens.split(1 << 20)
            )
            for name in self.split_names
        }

    def _size(self, split: str) -> int:
        return len(self.stream(split).tokens)

    def loader(self, settings: BatchSettings) -> TokenLoader:
        return TokenLoader(self, settings)


class TokenLoader(InMemoryLoader):
    """Batches x, y [b, seq] of int64: y is x one token later, and IGNORE past the end of the stream.

    Training: windows of seq + 1 tokens at offsets f(seed, epoch, place in the epoch), any offset equally likely; an
    epoch has as many windows as the stream has whole ones side by side. Evaluation: window after window from the start;
    each token but the first is predicted exactly once, and the last window is filled up with IGNORE.
    """

    def __init__(self, dataset: TokenSet, settings: BatchSettings) -> None:
        assert settings.seq is not None
        self.seq = settings.seq
        stream = dataset.stream(settings.split)
        every = len(stream.tokens)
        tokens = stream.tokens if settings.limit is None else stream.tokens[: settings.limit * self.seq + 1]
        self._length = len(tokens)
        needed = self.seq + 1 if settings.train else 2
        if self._length < needed:
            raise UsageError(
                f"{dataset.name}: the split {settings.split} has {self._length} tokens; "
                f"a sequence length of {self.seq} needs {needed}"
            )
        self._device, self._train = settings.device, settings.train
        self._resident = fits_on(settings.device, tokens.nbytes)
        home = settings.device if self._resident else torch.device("cpu")
        self._tokens = tokens.to(home)
        windows = self._length - 1
        windows = windows // self.seq if settings.train else -(-windows // self.seq)
        self._order = Order(
            windows,
            settings.batch_size,
            settings.seed,
            train=settings.train,
            shuffle=False,
            rank=settings.rank,
            world=settings.world,
            device=home,
        )
        self._window = counters(0, self.seq + 1, home)
        self.steps = self._order.steps
        if settings.train:
            self.targets = Targets(self.steps * settings.batch_size * self.seq)
        else:
            whole = self._length == every
            words, nbytes = (stream.words(), stream.bytes()) if whole else stream.part(self._length)
            self.targets = Targets(self._length - 1, words, nbytes)

    def assemble(self, ids: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
        starts = below(random, self._length - self.seq) if self._train else ids * self.seq
        places = starts[:, None] + self._window  # [b, seq + 1]
        last = self._length - 1
        found = self._tokens[places if self._train else places.clamp(max=last)].to(torch.int64)
        found &= BITS[self._tokens.dtype]
        x, y = found[:, :-1], found[:, 1:]
        if not self._train:
            y = y.masked_fill(places[:, 1:] > last, IGNORE)
        if not self._resident:
            pin = self._device.type == "cuda"
            x, y = ((p.contiguous().pin_memory() if pin else p).to(self._device, non_blocking=True) for p in (x, y))
        return x.contiguous(), y.contiguous()
