"""Models whose outputs are not those of the tests' data, or just about: `tests.helpers.misfits:segmenter`. All take sizes as they come."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Text(nn.Module):
    """[B, T] ids -> logits in the shape that `form` names, of so many tokens."""

    def __init__(self, vocab: int, form: str = "all", outputs: int | None = None) -> None:
        super().__init__()
        self.form = form
        self.table = nn.Embedding(vocab, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, outputs or vocab, bias=False)
        if outputs is None:
            self.head.weight = self.table.weight  # tied

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.head(self.body(self.table(ids)))
        if self.form == "last" and targets is None:  # as nanoGPT generates
            return logits[:, [-1], :], None
        return {
            "all": logits,
            "flat": logits.flatten(0, 1),
            "hidden": {"last_hidden_state": logits},
            "mapping": {"loss": None, "logits": logits},
            "last": logits,
        }[self.form]


def last_position() -> nn.Module:
    return Text(256, "last")


def hidden() -> nn.Module:
    return Text(256, "hidden")


def bytes_gpt() -> nn.Module:
    return Text(256)


def flat() -> nn.Module:
    return Text(300, "flat")


def mapping() -> nn.Module:
    return Text(256, "mapping")


def ascii_gpt() -> nn.Module:
    return Text(128)


def small_table() -> nn.Module:
    return Text(100, outputs=256)


def segmenter() -> nn.Module:
    """[B, 3, H, W] -> [B, 2, H, W]."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )


def classifier(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def four_classes() -> nn.Module:
    return classifier(4)


def many_classes() -> nn.Module:
    return classifier(1000)


class OfSixteen(nn.Module):
    """A classifier that was made for batches of sixteen."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(16, 3, 32, 32))


def of_sixteen() -> Any:
    import torch

    return OfSixteen(), torch.zeros(16, 3, 32, 32)
