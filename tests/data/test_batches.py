"""Batches of images in memory: augmentation against a slow reference, and the same data however it is asked for."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from sparseift_cli.base.randomness import counters, words
from sparseift_cli.data import Augment, Batches, open_data
from sparseift_cli.data.augment import Normalise, crop_and_flip, cut_out
from sparseift_cli.data.images import ImageSet
from sparseift_cli.errors import UsageError
from tests.helpers.gpu import never_waiting

ODD = (3, 7, 5)  # channels, height, width: no two alike


def images(n: int = 40, shape: tuple[int, int, int] = ODD) -> Tensor:
    return torch.randint(1, 256, (n, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def slow(image: Tensor, random: int, augment: Augment) -> Tensor:
    """One image, by loops: the word's bits 0-14 and 15-29 are the shifts, its sign the flip."""
    channels, height, width = image.shape
    span = 2 * augment.crop + 1
    down = ((random & 0x7FFF) * span >> 15) - augment.crop
    right = ((random >> 15 & 0x7FFF) * span >> 15) - augment.crop

    def pixel(c: int, y: int, x: int) -> int:
        if augment.padding == "reflect":
            y, x = (abs(v) if v < n else 2 * (n - 1) - v for v, n in ((y, height), (x, width)))
        return int(image[c, y, x]) if 0 <= y < height and 0 <= x < width else 0

    rows = [
        [
            [pixel(c, y + down, (width - 1 - x if augment.flip and random < 0 else x) + right) for x in range(width)]
            for y in range(height)
        ]
        for c in range(channels)
    ]
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize(("crop", "flip"), [(4, True), (2, False), (0, True), (0, False)])
def test_crop_and_flip_as_a_loop_would(crop: int, flip: bool, padding: str) -> None:
    augment = Augment(crop=crop, flip=flip, padding=padding)
    x, random = images(), words(5, counters(0, 40, "cpu"))
    want = torch.stack([slow(image, int(w), augment) for image, w in zip(x, random, strict=True)])
    assert torch.equal(crop_and_flip(x, random, augment), want)
    assert (crop, flip) == (0, False) or not torch.equal(x, want)


def test_shifts_are_all_alike_likely() -> None:
    """A single bright pixel shows where an image went: 81 shifts, flipped or not."""
    x = torch.zeros(20_000, 1, 9, 9, dtype=torch.uint8)
    x[:, :, 4, 4] = 255
    out = crop_and_flip(x, words(1, counters(0, len(x), "cpu")), Augment())
    assert (out > 0).sum().item() == len(x)
    places = out.flatten(1).argmax(1)
    counts = torch.bincount(places, minlength=81).float()
    assert ((counts - len(x) / 81) ** 2 / (len(x) / 81)).sum().item() < 80 + 5 * 160**0.5


def test_cut_out_as_a_loop_would() -> None:
    x = torch.rand(50, 2, 6, 8) + 1
    random = words(9, counters(0, 50, "cpu"))
    out = cut_out(x, random, 3)
    for image, got, w in zip(x, out, random.tolist(), strict=True):
        y = (w >> 30 & 0x7FFF) * 6 >> 15
        left = (w >> 45 & 0x7FFF) * 8 >> 15
        want = image.clone()
        want[:, max(0, y - 1) : y + 2, max(0, left - 1) : left + 2] = 0
        assert torch.equal(got, want)


def test_normalise() -> None:
    x, mean, std = images(), (0.1, 0.5, 0.9), (0.2, 0.25, 0.3)
    want = (x.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        got = Normalise(mean, std, device="cpu", dtype=dtype)(x, channels_last=dtype == torch.bfloat16)
        assert got.dtype == dtype
        assert got.is_contiguous(
            memory_format=torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
        )
        torch.testing.assert_close(got.double(), want, rtol=0.01, atol=tolerance)


# --- Batches ---


def small_set(n: int = 50, augment: Augment | None = None) -> ImageSet:
    """A set whose image i has label i."""

    def read(split: str) -> tuple[Tensor, Tensor]:
        return images(n) if split == "train" else images(n).flip(0), torch.arange(n)

    return ImageSet(
        "small",
        read,
        split_names=("train", "test"),
        shape=ODD,
        classes=n,
        source="made here",
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augment=augment,
    )


def by_label(loader: Batches, epoch: int) -> dict[int, Tensor]:
    return {int(label): image for x, y in loader.epoch(epoch) for image, label in zip(x, y, strict=True)}


def test_a_batch_is_the_reference_of_its_samples() -> None:
    dataset = small_set(augment=Augment(crop=2))
    loader = Batches(dataset, "train", 8, 3)
    x, y = loader.batch(2, 4)
    ids, random = loader._loader._order.at(2, 4)
    assert torch.equal(ids, y)
    source, _ = dataset.images("train")
    cut = torch.stack([slow(source[i], w, Augment(crop=2)) for i, w in zip(ids.tolist(), random.tolist(), strict=True)])
    torch.testing.assert_close(x, (cut.float() / 255 - 0.5) / 0.25)


def test_samples_do_not_depend_on_batches_or_ranks() -> None:
    dataset = small_set(48, Augment(crop=2, cutout=2))
    want = by_label(Batches(dataset, "train", 8, 1), 3)
    assert len(want) == 48
    for size, world in ((16, 1), (24, 1), (8, 2), (12, 4)):
        got: dict[int, Tensor] = {}
        for rank in range(world):
            got |= by_label(Batches(dataset, "train", size, 1, rank=rank, world=world), 3)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[label], want[label]) for label in want)


def test_epochs_and_seeds_differ_and_resuming_does_not() -> None:
    dataset = small_set(augment=Augment())
    loader = Batches(dataset, "train", 10, 0)
    a, b = loader.batch(0, 0), loader.batch(1, 0)
    assert not torch.equal(a[1], b[1])
    assert not torch.equal(a[1], Batches(dataset, "train", 10, 1).batch(0, 0)[1])
    running = [loader.at(step) for step in range(15)]
    for step in (14, 0, 7, 4, 5):
        fresh = Batches(dataset, "train", 10, 0).at(step)
        assert all(torch.equal(p, q) for p, q in zip(fresh, running[step], strict=True))
    rest = list(Batches(dataset, "train", 10, 0).epoch(1, start=3))
    assert [y.tolist() for _, y in rest] == [y.tolist() for _, y in running[8:10]]


def test_evaluation_sees_everything_once_and_unchanged() -> None:
    dataset = small_set(augment=Augment())
    loader = Batches(dataset, "test", 16)
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert len(loader) == loader.steps_per_epoch == 4
    assert loader.targets.tokens == 50
    assert torch.equal(y, torch.arange(50))
    torch.testing.assert_close(x, (dataset.images("test")[0].float() / 255 - 0.5) / 0.25)
    again = Batches(dataset, "train", 16, train=False, limit=20)
    assert [len(y) for _, y in again] == [16, 4]


def test_nothing_random_is_consumed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Batches(small_set(augment=Augment()), "train", 5).batch(0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_options_reach_the_batches() -> None:
    loader = Batches(small_set(), "train", 10, dtype=torch.bfloat16, channels_last=True, limit=30)
    x, y = loader.batch(0, 0)
    assert loader.steps_per_epoch == 3
    assert (x.dtype, y.dtype) == (torch.bfloat16, torch.int64)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert int(y.max()) < 30
    loader.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "unknown split of small 'valid'"),
        ({"batch_size": 51}, "50 samples do not fill one batch of 51"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 7, "world": 2}, "cannot be shared by 2"),
        ({"seq": 5}, "small has no sequence length"),
        ({"limit": 0}, "limit is 0"),
        ({"workers": True}, "workers is True"),
    ],
)
def test_refusals(arguments, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Batches(small_set(), **{"split": "train", "batch_size": 10, **arguments})


@pytest.mark.parametrize(
    "options", [{"crop": -1}, {"padding": "wrap"}, {"scale": (0.5, 0.1)}, {"ratio": (0, 1)}, {"cutout": 5000}]
)
def test_augmentations_that_make_no_sense(options) -> None:
    with pytest.raises(UsageError):
        Augment(**options)


@pytest.mark.parametrize("what", ["labels", "shape", "count", "negative"])
def test_sets_that_do_not_hold_what_they_say(what: str) -> None:
    x, y = images(4), torch.arange(4)
    bad = {"labels": (x, y + 1), "shape": (x[:, :1], y), "count": (x, y[:3]), "negative": (x, y - 1)}[what]
    dataset = ImageSet(
        "bad", lambda _: bad, split_names=("train",), shape=ODD, classes=4, source="here", mean=(0.5,), std=(0.5,)
    )
    with pytest.raises(UsageError, match="here: "):
        dataset.images("train")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("resident", [True, False])
def test_a_gpu_sees_what_a_cpu_sees(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with no question to the device, and whether or not the set lies there."""
    dataset = open_data("synthetic-images", train=1000)
    options = {"augment": Augment(cutout=8), "channels_last": True}
    want = Batches(dataset, "train", 128, 1, **options)
    monkeypatch.setattr("sparseift_cli.data.images.fits_on", lambda device, _: device.type == "cpu" or resident)
    loader = Batches(dataset, "train", 128, 1, device="cuda", **options)
    loader.batch(0, 0)
    with never_waiting() if resident else contextlib.nullcontext():
        found = [loader.batch(epoch, step) for epoch in (0, 1) for step in range(3)]
    for index, (x, y) in enumerate(found):
        wanted = want.batch(*divmod(index, 3))
        assert torch.equal(x.cpu(), wanted[0])
        assert torch.equal(y.cpu(), wanted[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_gpu_reads_what_a_cpu_reads(split: str) -> None:
    dataset = open_data("synthetic-text", train=9000, valid=3000)
    want, loader = (Batches(dataset, split, 8, 1, seq=32, device=device) for device in ("cpu", "cuda"))
    loader.batch(0, 0)
    with never_waiting():
        found = [loader.batch(0, step) for step in range(loader.steps_per_epoch)]
    for got, wanted in zip(found, want, strict=True):
        assert all(torch.equal(g.cpu(), w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", ["synthetic-images", "synthetic-text"])
def test_an_assembly_makes_the_same_batches(name: str) -> None:
    batches = Batches(open_data(name), "train", 16, seed=3, seq=8 if name.endswith("text") else None)
    assembly = batches.assembly
    assert assembly is not None
    for epoch, step in ((0, 0), (0, 5), (1, 2)):
        made, wanted = assembly.assemble(*assembly.picks(epoch, step)), batches.batch(epoch, step)
        assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
