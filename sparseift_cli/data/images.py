"""Image sets that fit in memory: uint8 on the device for good, augmented and normalised there, a whole batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..base.durations import held_out_images
from ..errors import UsageError
from .augment import Augment, Normalise, crop_and_flip, cut_out
from .dataset import BatchSettings, DataSet, Targets, fits_on, hash_tensors, raw_bytes, stratified_draw
from .order import InMemoryLoader, Order

Read = Callable[[str], tuple[Tensor, Tensor]]


class ImageSet(DataSet):
    """Images that `read(split)` gives as uint8 [N, C, H, W] with integer labels [N]."""

    kind = "image"

    def __init__(
        self,
        name: str,
        read: Read,
        *,
        split_names: Sequence[str],
        shape: tuple[int, int, int],
        classes: int,
        source: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: Augment | None = None,
    ) -> None:
        self.name, self.source, self.shape, self.classes = name, source, shape, classes
        self.mean, self.std, self.augment = mean, std, augment
        self.split_names, self._read = tuple(split_names), read
        self._held: dict[str, tuple[Tensor, Tensor]] = {}

    def images(self, split: str) -> tuple[Tensor, Tensor]:
        """The split: uint8 images [N, C, H, W] and int64 labels [N], in main memory. Read once.

        Raises:
            UsageError: files that are damaged, of another shape, or with labels beyond `classes`.
        """
        if split not in self._held:
            images, labels = self._read(split)
            labels = labels.to(torch.int64)
            if len(images) != len(labels) or len(labels) == 0:
                raise UsageError(f"{self.source}: {len(images)} images and {len(labels)} labels in the split {split}")
            if tuple(images.shape[1:]) != self.shape:
                raise UsageError(f"{self.source}: images of {tuple(images.shape[1:])}, not of {self.shape}")
            low, high = (int(v) for v in labels.aminmax())
            if low < 0 or high >= self.classes:
                raise UsageError(
                    f"{self.source}: a label {high if high >= self.classes else low} in {split}; "
                    f"{self.name} has the classes 0 to {self.classes - 1}"
                )
            self._held[split] = (images.contiguous(), labels)
        return self._held[split]

    def with_validation(self, share: float) -> ImageSet:
        """The same set, with `share` of each class's training images as the split valid. They then lie in memory twice."""
        self.require_no_validation()
        labels = self.images("train")[1]
        count = held_out_images(len(labels), share)
        if not 0 < count < len(labels):
            raise UsageError(
                f"{count} of {len(labels)} training images of {self.name} cannot be held out",
                hint="choose another data.validation",
            )
        held = stratified_draw(labels, count, self.name)

        def read(split: str) -> tuple[Tensor, Tensor]:
            if split not in ("train", "valid"):
                return self.images(split)
            images, labels = self.images("train")
            wanted = held if split == "valid" else ~held
            return images[wanted], labels[wanted]

        channels, height, width = self.shape
        divided = ImageSet(
            self.name,
            read,
            split_names=("train", "valid", *(name for name in self.split_names if name != "train")),
            shape=(channels, height, width),
            classes=self.classes,
            source=self.source,
            mean=self.mean,
            std=self.std,
            augment=self.augment,
        )
        divided.drawn_from_training = drawn_images(count, len(labels))
        return divided

    def repeats(self, split: str) -> int:
        known = {bytes(raw_bytes(image)) for image in self.images("train")[0]}
        return sum(bytes(raw_bytes(image)) in known for image in self.images(split)[0])

    def _sha256(self) -> str:
        return hash_tensors(
            (f"{name}/{part}", tensor)
            for name in self.split_names
            for part, tensor in zip(("images", "labels"), self.images(name), strict=True)
        )

    def _size(self, split: str) -> int:
        return len(self.images(split)[1])

    def loader(self, settings: BatchSettings) -> ImageLoader:
        return ImageLoader(self, settings)


def drawn_images(count: int, size: int) -> str:
    """What was held out, in words."""
    return (
        f"{count:,} of its {size:,} training images, the same share of every class, drawn once for all seeds and runs"
    )


class ImageLoader(InMemoryLoader):
    """Batches x [b, C, H, W] of floats and y [b] of int64."""

    def __init__(self, dataset: ImageSet, settings: BatchSettings) -> None:
        images, labels = (part[: settings.limit] for part in dataset.images(settings.split))
        self._settings = settings
        self._resident = fits_on(settings.device, images.numel())
        home = settings.device if self._resident else torch.device("cpu")
        self._images, self._labels = images.to(home), labels.to(home)
        self._order = Order(
            len(labels),
            settings.batch_size,
            settings.seed,
            train=settings.train,
            rank=settings.rank,
            world=settings.world,
            device=home,
        )
        self._normalise = Normalise(dataset.mean, dataset.std, device=settings.device, dtype=settings.dtype)
        self.steps = self._order.steps
        self.targets = Targets(len(labels) if not settings.train else self.steps * settings.batch_size)

    def assemble(self, ids: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self._images.index_select(0, ids), self._labels.index_select(0, ids), random]
        if not self._resident:
            pin = self._settings.device.type == "cuda"
            parts = [(p.pin_memory() if pin else p).to(self._settings.device, non_blocking=True) for p in parts]
        images, labels, random = parts
        augment = self._settings.augment
        if augment is not None and (augment.crop or augment.flip):
            images = crop_and_flip(images, random, augment)
        floats = self._normalise(images, channels_last=self._settings.channels_last)
        if augment is not None and augment.cutout:
            floats = cut_out(floats, random, augment.cutout)
        return floats, labels
