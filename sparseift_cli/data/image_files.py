"""Image files, decoded, cropped and resized by worker processes while the model trains."""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..base.durations import held_out_images
from ..base.machine import cores
from ..base.randomness import fractions
from ..errors import UsageError
from .augment import Augment, Normalise
from .dataset import BatchSettings, DataSet, Targets, stratified_draw
from .images import drawn_images
from .order import Order
from .places import read_file

_AHEAD = 4  # batches that each worker holds ready
Item = tuple[int, int]  # which file, and its random word
Box = tuple[int, int, int, int]  # left, top, width, height


@dataclass(frozen=True, slots=True)
class _Broken:
    """An image that cannot be read. Workers hand it over as a value: an exception would arrive with their traceback."""

    what: str


class FolderLoader:
    """Batches x [b, 3, size, size] of floats and y [b] of int64; decoded as uint8, normalised on the device.

    Batches asked for in order come from workers that run ahead; another one starts them afresh from there.
    """

    assembly = None  # files are decoded in main memory

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        settings: BatchSettings,
        *,
        size: int,
        resize: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        _pillow()  # says at once what is missing, not in a worker
        self._settings = settings
        self._files = Decoder(files, size, resize, settings.augment)
        self._order = Order(
            len(files),
            settings.batch_size,
            settings.seed,
            train=settings.train,
            rank=settings.rank,
            world=settings.world,
        )
        self._normalise = Normalise(mean, std, device=settings.device, dtype=settings.dtype)
        self._running: Iterator[Any] | None = None
        self._next = (0, 0)
        self.steps = self._order.steps
        self.targets = Targets(self.steps * settings.batch_size if settings.train else len(files))

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        place = (epoch if self._settings.train else 0, step)  # the epochs of an evaluation are all alike
        if self._settings.workers == 0:
            found = collate([self._files[item] for item in self._items(*place)])
        else:
            if self._running is None or self._next != place:
                self._items(*place)  # refuses a step beyond the epoch
                self._running = self._start(*place)
            found = next(self._running)
            self._next = self._after(*place)
        if isinstance(found, _Broken):
            self.close()
            raise UsageError(found.what, hint="delete or replace this file")
        images, labels = (part.to(self._settings.device, non_blocking=True) for part in found)
        images = images.expand(-1, -1, self._files.size, self._files.size)  # also where there are none
        return self._normalise(images, channels_last=self._settings.channels_last), labels

    def close(self) -> None:
        self._running = None  # the iterator ends its workers when it goes

    def _start(self, epoch: int, step: int) -> Iterator[Any]:
        loader = DataLoader(
            self._files,
            batch_sampler=self._endless(epoch, step),
            collate_fn=collate,
            num_workers=min(self._settings.workers, cores()),  # more would only wait for each other
            worker_init_fn=leave_signals,
            prefetch_factor=_AHEAD,
            pin_memory=self._settings.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from, and so change, the global one
        )
        with _signals_held_back():
            return iter(loader)

    def _endless(self, epoch: int, step: int) -> Iterator[list[Item]]:
        while True:
            yield self._items(epoch, step)
            epoch, step = self._after(epoch, step)

    def _after(self, epoch: int, step: int) -> tuple[int, int]:
        if step + 1 < self.steps:
            return epoch, step + 1
        return (epoch + 1 if self._settings.train else 0), 0

    def _items(self, epoch: int, step: int) -> list[Item]:
        ids, random = self._order.at(epoch, step)
        return list(zip(ids.tolist(), random.tolist(), strict=True))


class Decoder(Dataset[Any]):
    """Image files as uint8 tensors [3, size, size], with their labels."""

    def __init__(self, files: Sequence[tuple[str, int]], size: int, resize: int, augment: Augment | None) -> None:
        self.files, self.size, self.resize, self.augment = files, size, resize, augment

    def __getitem__(self, item: Item) -> tuple[Tensor, int] | _Broken:
        path, label = self.files[item[0]]
        image = _pillow()
        try:
            with warnings.catch_warnings(action="ignore"), image.open(path) as file:  # odd metadata
                picture = file.convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError, image.DecompressionBombError) as error:
            return _Broken(f"{path}: not a readable image ({str(error).splitlines()[0] if str(error) else 'damaged'})")
        random = fractions(item[1])
        if self.augment is None:
            picture = _centre(picture, self.size, self.resize, image)
        else:
            left, top, width, height = random_box(picture.size, random, self.augment)
            picture = picture.crop((left, top, left + width, top + height))
            picture = picture.resize((self.size, self.size), image.Resampling.BILINEAR)
            if self.augment.flip and next(random) < 0.5:
                picture = picture.transpose(image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return pixels.view(self.size, self.size, 3).permute(2, 0, 1).contiguous(), label


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """While workers are forked: one inherits the mask, and so cannot die of a signal before `leave_signals` has run."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals(_: int) -> None:
    """In a worker: signals are for the process that trains, which ends its workers when it has saved.

    A cluster sends SIGTERM to all processes of a job, and a worker that died of it would end the run with a traceback. Who
    sent it is known on Linux alone; elsewhere SIGTERM ends a worker as ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def collate(samples: Sequence[tuple[Tensor, int] | _Broken]) -> tuple[Tensor, Tensor] | _Broken:
    """uint8 [b, 3, size, size] and int64 [b], or what is wrong with the first image that cannot be read."""
    images: list[Tensor] = []
    labels: list[int] = []
    for sample in samples:
        if isinstance(sample, _Broken):
            return sample
        images.append(sample[0])
        labels.append(sample[1])
    if not images:  # a rank without a share of an evaluation's last batch
        return torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def random_box(size: tuple[int, int], random: Iterator[float], augment: Augment) -> Box:
    """RandomResizedCrop's box in an image of `size` (width, height): Szegedy et al. 2014, as torchvision draws it.

    Ten tries at an area and a log-uniform aspect ratio; then the largest box in the centre with an allowed ratio.
    """
    width, height = size
    low, high = (math.log(r) for r in augment.ratio)
    for _ in range(10):
        area = width * height * (augment.scale[0] + next(random) * (augment.scale[1] - augment.scale[0]))
        aspect = math.exp(low + next(random) * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(next(random) * (width - w + 1)), int(next(random) * (height - h + 1)), w, h
    aspect = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (width - w) // 2, (height - h) // 2, w, h


def _centre(picture: Any, size: int, resize: int, image: Any) -> Any:
    """The shorter side to `resize`, then the middle `size` x `size`, rounded as torchvision rounds."""
    width, height = picture.size
    if width <= height:
        shape = (resize, int(resize * height / width))
    else:
        shape = (int(resize * width / height), resize)
    picture = picture.resize(shape, image.Resampling.BILINEAR)
    left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return picture.crop((left, top, left + size, top + size))


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError:
        raise UsageError("image folders need Pillow, which is not installed", hint="pip install pillow") from None


SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_READ_WHOLE = 1 << 30  # bytes: up to here the hash is one of contents


class FolderSet(DataSet):
    """Image files [3, size, size] once decoded, labelled by the alphabetical place of their class folder."""

    kind = "image"

    def __init__(
        self,
        name: str,
        folders: dict[str, Path],
        *,
        size: int,
        resize: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.name, self.source = name, str(next(iter(folders.values())).parent)
        self.shape, self.resize, self.mean, self.std = (3, size, size), resize, mean, std
        self.augment = Augment()
        self.split_names, self._folders = tuple(folders), folders
        self._classes = sorted(entry.name for entry in os.scandir(folders["train"]) if entry.is_dir())
        self.classes = len(self._classes)
        self._held: dict[str, list[tuple[str, int]]] = {}
        if not self._classes:
            raise UsageError(f"{folders['train']}: holds no folder for any class")

    def files(self, split: str) -> list[tuple[str, int]]:
        """Path and label of every image of a split, sorted by class and path.

        Raises:
            UsageError: a class that the training split does not have, or no images.
        """
        if split not in self._held:
            folder = self._folders[split]
            labels = {name: label for label, name in enumerate(self._classes)}
            found: list[tuple[str, int]] = []
            for entry in sorted((e for e in os.scandir(folder) if e.is_dir()), key=lambda e: e.name):
                if entry.name not in labels:
                    raise UsageError(f"{entry.path}: the training split has no class of this name")
                found += [(path, labels[entry.name]) for path in _images(entry.path)]
            if not found:
                raise UsageError(f"{folder}: holds no images in its class folders")
            self._held[split] = found
        return self._held[split]

    def with_validation(self, share: float) -> FolderSet:
        """The same set, with `share` of each class's training files as the split valid."""
        self.require_no_validation()
        files = self.files("train")
        count = held_out_images(len(files), share)
        if not 0 < count < len(files):
            raise UsageError(
                f"{self.source}: {count} of {len(files)} training images cannot be held out",
                hint=f"put images into {self.source}/val, or choose another data.validation",
            )
        held = stratified_draw(torch.tensor([label for _, label in files]), count, self.name).tolist()
        folders = {"train": self._folders["train"], "valid": self._folders["train"], **self._folders}
        divided = FolderSet(self.name, folders, size=self.shape[1], resize=self.resize, mean=self.mean, std=self.std)
        for split, wanted in (("train", False), ("valid", True)):
            divided._held[split] = [file for file, drawn in zip(files, held, strict=True) if drawn is wanted]
        divided.drawn_from_training = drawn_images(count, len(files))
        return divided

    def repeats(self, split: str) -> int:
        """Only files of one size are compared, and none of a set whose contents are not read for the hash."""
        if self.hashed != "content":
            return 0
        by_size: dict[int, list[str]] = {}
        for path, _ in self.files("train"):
            by_size.setdefault(Path(path).stat().st_size, []).append(path)
        digests: dict[int, set[bytes]] = {}
        found = 0
        for path, _ in self.files(split):
            size = Path(path).stat().st_size
            if size in by_size:
                if size not in digests:
                    digests[size] = {_digest(each) for each in by_size[size]}
                found += _digest(path) in digests[size]
        return found

    def _size(self, split: str) -> int:
        return len(self.files(split))

    @cached_property
    def _nbytes(self) -> int:
        return sum(Path(path).stat().st_size for split in self.split_names for path, _ in self.files(split))

    @property
    def hashed(self) -> str:
        """Contents up to 1 GiB. Beyond it, names and sizes: ImageNet's 150 GB would take longer than its first steps."""
        return "content" if self._nbytes <= _READ_WHOLE else "names and sizes"

    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for split in self.split_names:
            for path, label in self.files(split):
                name = Path(path).relative_to(self._folders[split]).as_posix()
                digest.update(f"{split}/{name} {label} {Path(path).stat().st_size}\n".encode())
                if self.hashed == "content":
                    digest.update(read_file(Path(path), _READ_WHOLE))
        return digest.hexdigest()

    def loader(self, settings: BatchSettings) -> FolderLoader:
        files = self.files(settings.split)[: settings.limit]
        return FolderLoader(files, settings, size=self.shape[1], resize=self.resize, mean=self.mean, std=self.std)


def _digest(path: str) -> bytes:
    return hashlib.sha256(read_file(Path(path), _READ_WHOLE)).digest()


def _images(folder: str) -> list[str]:
    """Image files at any depth below a folder, sorted."""
    found: list[str] = []
    for parent, _, names in os.walk(folder):
        # As strings: a Path for each of 1.3 million files takes seconds.
        found += [f"{parent}/{name}" for name in names if name[name.rfind(".") :].lower() in SUFFIXES]
    return sorted(found)
