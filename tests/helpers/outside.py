"""What a package of somebody else brings: a data set, a model, a metric, an optimiser and a schedule of the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from sparseift_cli.base.durations import Duration
from sparseift_cli.base.metrics import Metric, percent
from sparseift_cli.base.options import Option
from sparseift_cli.data import DataSource, ImageSet
from sparseift_cli.models.zoo.catalog import ModelInfo
from sparseift_cli.optim.optimizers import ParameterGroup
from sparseift_cli.optim.schedules import InSteps, Rates


def open_stripes(root: str | Path | None = None) -> ImageSet:
    """Images [1, 8, 8] with a bright row (class 0) or a bright column (class 1)."""

    def read(split: str) -> tuple[Tensor, Tensor]:
        labels = torch.arange(64 if split == "train" else 16) % 2
        images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
        for image, label, place in zip(images, labels, torch.arange(len(labels)) // 2 % 8, strict=True):
            (image[0].T if label else image[0])[place] = 255
        return images, labels

    return ImageSet(
        "stripes",
        read,
        split_names=("train", "test"),
        shape=(1, 8, 8),
        classes=2,
        source="made up",
        mean=(0.5,),
        std=(0.5,),
    )


STRIPES = DataSource(
    name="stripes",
    kind="image",
    open=open_stripes,
    image=(1, 8, 8),
    classes=2,
    samples=64,
    splits=("train", "test"),
    can_hold_out=True,
)


def small_net(*, num_classes: int, image: tuple[int, int, int]) -> nn.Module:
    """[B, C, H, W] -> [B, num_classes]."""
    layers = [nn.Conv2d(image[0], 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


SMALL_NET = ModelInfo("small_net", make=small_net, title="Two convolutions", image=(1, 8, 8), num_classes=2)


def _wrong(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.argmax(-1).ne(targets).sum()


ERROR = Metric("error", "error (%)", "points", lower_is_better=True, total=_wrong, value=percent)
OTHER_ERROR = Metric("error", "error (%)", "points", lower_is_better=False, total=_wrong, value=percent)


@dataclass(frozen=True)
class RMSProp:
    """Gradients over the root of their mean square."""

    lr: Annotated[float, Option("Learning rate at its peak.", above=0)] = 0.01
    alpha: Annotated[float, Option("Decay of the mean square.", minimum=0, below=1)] = 0.9

    def build(self, groups: Sequence[ParameterGroup], device: torch.device) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(groups, self.lr, self.alpha)


@dataclass(frozen=True)
class Halving:
    """Half the learning rate after every `period`."""

    period: Annotated[Duration, Option("Time between two halvings.")] = "50%"

    def rates(self, peak: float, steps: int, in_steps: InSteps) -> Rates:
        period = max(1, in_steps(self.period))
        return lambda step: peak / 2 ** (step // period)
