"""Made-up data in integer arithmetic, the same on every machine: images of classes, and text of known entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .source import DataSource, require_integer

if TYPE_CHECKING:
    from torch import Tensor

    from .images import ImageSet
    from .tokens import Stream, TokenSet

_PATCH = 4  # a class is a coarse picture of _PATCH x _PATCH fields for every channel
_CHAINS = 1024  # text is written by so many hands at once, one token each at a time


def open_synthetic_images(
    root: None = None,
    *,
    classes: int = 10,
    size: int = 32,
    channels: int = 3,
    train: int = 2048,
    test: int = 512,
    noise: int = 96,
    seed: int = 0,
) -> ImageSet:
    """Images [channels, size, size], class by turns: a coarse picture of its own for each class, under noise.

    `noise` (0 to 255) is the range of what is added to every pixel; at 255 little of the class is left to see.
    Raises UsageError for sizes out of range.
    """
    import torch

    from ..base.randomness import counters, key_of, lane, words
    from .images import ImageSet

    for name, value, low in (("classes", classes, 2), ("size", size, 1), ("channels", channels, 1)):
        require_integer(name, value, low, 1 << 16)
    sizes = {"train": require_integer("train", train, 1, 1 << 24), "test": require_integer("test", test, 1, 1 << 24)}
    require_integer("noise", noise, 0, 255)

    def read(split: str) -> tuple[Tensor, Tensor]:
        labels = torch.arange(sizes[split]) % classes
        fields = words(key_of(seed, "pictures"), counters(0, classes * channels * _PATCH**2, "cpu"))
        pictures = lane(fields, 0, 256 - noise).view(classes, channels, _PATCH, _PATCH)
        place = torch.arange(size) * _PATCH // size
        pictures = pictures[:, :, place[:, None], place]
        pixels = words(key_of(seed, "noise", split), counters(0, sizes[split] * channels * size * size, "cpu"))
        added = lane(pixels, 0, noise + 1).view(-1, channels, size, size)
        return (pictures[labels] + added).to(torch.uint8), labels

    return ImageSet(
        "synthetic-images",
        read,
        split_names=("train", "test"),
        shape=(channels, size, size),
        classes=classes,
        source=f"made up: noise {noise}, seed {seed}",
        mean=(0.5,) * channels,
        std=(0.2,) * channels,
    )


SYNTHETIC_IMAGES = DataSource(
    name="synthetic-images",
    kind="image",
    open=open_synthetic_images,
    summary="made-up images of any size",
    splits=("train", "test"),
    recipe_options=("size", "channels", "classes", "train"),
)


def open_synthetic_text(
    root: None = None, *, vocab: int = 64, order: int = 1, train: int = 1 << 20, valid: int = 1 << 16, seed: int = 0
) -> TokenSet:
    """A Markov chain: after every `order` tokens one of four may follow, with probabilities 1/2, 1/4, 1/8 and 1/8.

    So the best any model can do is 1.75 bits, or 1.213 nats, a token. Raises UsageError for sizes out of range.
    """
    from ..base.randomness import key_of
    from .tokens import Stream, TokenSet

    require_integer("vocab", vocab, 4, 1 << 31)
    require_integer("order", order, 1, 8)
    sizes = {"train": require_integer("train", train, 2, 1 << 30), "valid": require_integer("valid", valid, 2, 1 << 30)}

    def read(split: str) -> Stream:
        return Stream(_chain(sizes[split], vocab, order, key_of(seed, "rule"), key_of(seed, "draws", split)))

    return TokenSet(
        "synthetic-text", read, split_names=tuple(sizes), vocab=vocab, source=f"made up: order {order}, seed {seed}"
    )


SYNTHETIC_TEXT = DataSource(
    name="synthetic-text",
    kind="tokens",
    open=open_synthetic_text,
    summary="a Markov chain of 1.75 bits a token",
    splits=("train", "valid"),
)


def _chain(length: int, vocab: int, order: int, rule: int, draws: int) -> Tensor:
    """int32 tokens [length]. One stream, cut into pieces written side by side: they join where one ends by chance."""
    import torch

    from ..base.randomness import below, counters, word, words

    steps = -(-length // _CHAINS)
    text = torch.zeros(_CHAINS, order + steps, dtype=torch.int64)
    text[:, :order] = below(words(word(draws, -1), counters(0, _CHAINS * order, "cpu")), vocab).view(_CHAINS, order)
    for step in range(steps):
        random = words(draws, counters(step * _CHAINS, (step + 1) * _CHAINS, "cpu"))
        eighth = random & 7
        choice = (eighth >= 4).long() + (eighth >= 6) + (eighth >= 7)  # 0..3 of the four
        state = torch.zeros(_CHAINS, dtype=torch.int64)
        for back in range(order):
            state = words(rule, state * 1_000_003 + text[:, step + back])
        text[:, order + step] = (below(state, vocab) + choice) % vocab
    return text[:, order:].reshape(-1)[:length].to(torch.int32)
