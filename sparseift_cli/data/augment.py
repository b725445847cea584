"""Augmentation of a whole batch on its device: integer gathers, so a CPU and a GPU give the same pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..base.randomness import coin, lane
from ..errors import UsageError, one_of


@dataclass(frozen=True, slots=True)
class Augment:
    """What happens to a training image, drawn anew for every image and epoch.

    Sets in memory (CIFAR, MNIST, ...) use `crop`, `padding` and `cutout`; image folders `scale` and `ratio`; both `flip`.
    """

    crop: int = 4  # pixels of padding on every side, out of which the image is cut again; 0: no crop
    padding: Literal["zeros", "reflect"] = (
        "zeros"  # zeros are black, as in the usual recipes: padded before normalising
    )
    flip: bool = True  # left to right, every second time
    cutout: int = 0  # side in pixels of a square set to the mean, its centre anywhere in the image; 0: none
    scale: tuple[float, float] = (0.08, 1.0)  # RandomResizedCrop: share of the area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # RandomResizedCrop: width / height

    def __post_init__(self) -> None:
        one_of("padding", self.padding, ("zeros", "reflect"))
        for name, value, top in (("crop", self.crop, 1 << 10), ("cutout", self.cutout, 1 << 10)):
            if not 0 <= value <= top:
                raise UsageError(f"{name} is {value}; it is a number of pixels from 0 to {top}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise UsageError(f"no crop has an area of {self.scale} and a width / height of {self.ratio}")


def crop_and_flip(images: Tensor, random: Tensor, augment: Augment) -> Tensor:
    """uint8 images [B, C, H, W] shifted by up to `augment.crop` pixels and flipped, by their words `random` [B]."""
    height, width = images.shape[2:]
    pad = augment.crop
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    if augment.flip:
        columns = torch.where(coin(random)[:, None], width - 1 - columns, columns)
    rows = rows + (lane(random, 0, 2 * pad + 1) - pad)[:, None]  # [B, H] of the image that is read from
    columns = columns + (lane(random, 1, 2 * pad + 1) - pad)[:, None]  # [B, W]
    row, column = _inside(rows, height, augment.padding), _inside(columns, width, augment.padding)
    places = (row[:, :, None] * width + column[:, None, :]).flatten(1)  # [B, HW]
    found = images.flatten(2).gather(2, places[:, None].expand(-1, images.shape[1], -1)).view_as(images)
    if pad and augment.padding == "zeros":
        seen = (row == rows)[:, :, None] & (column == columns)[:, None, :]
        found *= seen[:, None]
    return found


def _inside(index: Tensor, size: int, padding: str) -> Tensor:
    """int64 [*] indices within 0..size-1: one outside becomes the nearest, or its mirror image."""
    if padding == "reflect":
        index = (size - 1) - ((size - 1) - index.abs()).abs()
    return index.clamp(0, size - 1)


def cut_out(images: Tensor, random: Tensor, side: int) -> Tensor:
    """Normalised images [B, C, H, W] with a square of `side` pixels each set to 0, the mean (DeVries & Taylor 2017)."""
    hidden: list[Tensor] = []
    for index, size in ((2, images.shape[2]), (3, images.shape[3])):
        start = lane(random, index, size)[:, None] - side // 2
        place = torch.arange(size, device=images.device)
        hidden.append((place >= start) & (place < start + side))
    square = hidden[0][:, :, None] & hidden[1][:, None, :]
    return images.masked_fill(square[:, None], 0)


class Normalise:
    """uint8 images to floats: (x / 255 - mean) / std for every channel, in float32, then in `dtype`."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self._shift = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1) * 255
        self._scale = 1 / (torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1) * 255)

    def __call__(self, images: Tensor, *, channels_last: bool = False) -> Tensor:
        """Images [B, C, H, W] of `dtype`, in the memory format asked for."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        floats = images.to(torch.float32, memory_format=layout)
        return floats.sub_(self._shift).mul_(self._scale).to(self.dtype)
