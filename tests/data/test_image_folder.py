"""Folders of images: what is decoded, in which order, with and without workers, and what is said of broken files."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from sparseift_cli.base.randomness import fractions, word
from sparseift_cli.data import Augment, Batches, image_files, open_data
from sparseift_cli.data.image_files import random_box
from sparseift_cli.errors import UsageError

image_module = pytest.importorskip("PIL.Image")
CLASSES = ("ant", "bee", "cow")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve training and six validation images of different sizes; the colour tells class and number."""
    for split, each in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                picture = image_module.new("RGB", (20 + 3 * i, 30 - 4 * i), (60 * label, 60 * i, 200))
                picture.save(folder / f"{i}.{'png' if i % 2 else 'bmp'}")
            (folder / "notes.txt").write_text("no image")
    return tmp_path


def labels_of(dataset, split: str) -> list[int]:
    return [label for _, label in dataset.files(split)]


def test_folders_are_labelled_by_name(root: Path) -> None:
    dataset = open_data("image-folder", root, size=16)
    assert (dataset.kind, dataset.shape, dataset.classes) == ("image", (3, 16, 16), 3)
    assert dict(dataset.splits) == {"train": 12, "valid": 6}
    assert labels_of(dataset, "valid") == [0, 0, 1, 1, 2, 2]
    assert dataset.resize == 18
    assert dataset.held_out == "valid"


def test_colours_survive(root: Path) -> None:
    dataset = open_data("image-folder", root, size=8, mean=(0, 0, 0), std=(1, 1, 1))
    x, y = next(iter(Batches(dataset, "valid", 6)))
    assert y.tolist() == [0, 0, 1, 1, 2, 2]
    for image, label, i in zip(x, y.tolist(), [0, 1] * 3, strict=True):
        torch.testing.assert_close(image[:, 3, 3] * 255, torch.tensor([60.0 * label, 60.0 * i, 200.0]))


def test_decoding_is_pillows(root: Path) -> None:
    """A picture with structure: evaluation as the recipe of resize and centre crop says, training as its box says."""
    noisy = image_module.effect_noise((37, 23), 80).convert("RGB")
    for path in root.glob("*/*/*.*"):
        path.unlink()
    for split, name in itertools.product(("train", "val"), CLASSES):
        noisy.save(root / split / name / "n.png")
    dataset = open_data("image-folder", root, size=14, mean=(0, 0, 0), std=(1, 1, 1))
    got = Batches(dataset, "valid", 3).batch(0, 0)[0][0] * 255
    small = noisy.resize((25, 16), image_module.Resampling.BILINEAR).crop((6, 1, 20, 15))
    assert torch.equal(got.round().byte().permute(1, 2, 0).flatten(), torch.tensor(list(small.tobytes())).byte())
    loader = Batches(dataset, "train", 3, 4)
    x, y = loader.batch(1, 0)
    for image, label in zip(x, y.tolist(), strict=True):
        ids, random = loader._loader._order.at(1, 0)
        draws = fractions(int(random[ids.tolist().index(label)]))
        left, top, w, h = random_box((37, 23), draws, Augment())
        want = noisy.crop((left, top, left + w, top + h)).resize((14, 14), image_module.Resampling.BILINEAR)
        if next(draws) < 0.5:
            want = want.transpose(image_module.Transpose.FLIP_LEFT_RIGHT)
        flat = (image * 255).round().byte().permute(1, 2, 0).flatten()
        assert torch.equal(flat, torch.tensor(list(want.tobytes())).byte())


def test_workers_change_nothing(root: Path) -> None:
    """Two workers, asked in order over two epochs, from the middle, and out of order."""
    dataset = open_data("image-folder", root, size=8)
    alone, helped = Batches(dataset, "train", 4, 1), Batches(dataset, "train", 4, 1, workers=2)
    state = torch.get_rng_state()
    for epoch, step in [(0, 1), (0, 2), (1, 0), (1, 1), (0, 1)]:
        for got, want in zip(helped.batch(epoch, step), alone.batch(epoch, step), strict=True):
            assert torch.equal(got, want)
    helped.close()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(alone.batch(0, 0)[1], alone.batch(1, 0)[1]) or not torch.equal(
        alone.batch(0, 0)[0], alone.batch(1, 0)[0]
    )


def test_no_more_workers_than_cores(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch warns of more, and a warning is an error here."""
    monkeypatch.setattr(image_files, "cores", lambda: 1)
    loader = Batches(open_data("image-folder", root, size=8), "valid", 4, workers=64)
    assert len(list(loader)) == len(list(Batches(open_data("image-folder", root, size=8), "valid", 4)))


def test_evaluations_follow_each_other_without_new_workers(root: Path) -> None:
    loader = Batches(open_data("image-folder", root, size=8), "valid", 4, workers=1)
    first = [y.tolist() for _, y in loader]
    running = loader._loader._running
    assert [y.tolist() for _, y in loader] == first == [[0, 0, 1, 1], [2, 2]]
    assert loader._loader._running is running
    loader.close()


def test_ranks_may_have_nothing_left(root: Path) -> None:
    loaders = [Batches(open_data("image-folder", root, size=8), "valid", 5, rank=r, world=2) for r in range(2)]
    assert [[tuple(x.shape) for x, _ in loader] for loader in loaders] == [
        [(2, 3, 8, 8), (0, 3, 8, 8)],
        [(3, 3, 8, 8), (1, 3, 8, 8)],
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_one_line(root: Path, workers: int) -> None:
    path = root / "val" / "bee" / "0.bmp"
    path.write_bytes(path.read_bytes()[:60])
    loader = Batches(open_data("image-folder", root, size=8), "valid", 6, workers=workers)
    with pytest.raises(UsageError, match=r"bee/0\.bmp: not a readable image") as caught:
        loader.batch(0, 0)
    assert "\n" not in caught.value.message


def test_grey_and_transparent_images_are_colour_images(root: Path) -> None:
    for mode, colour in (("L", 9), ("RGBA", (9, 9, 9, 0)), ("P", 0), ("1", 1), ("LA", (9, 0))):
        image_module.new(mode, (9, 9), colour).save(root / "val" / "ant" / f"mode{mode}.png")
    x, _ = Batches(open_data("image-folder", root, size=8), "valid", 11).batch(0, 0)
    assert x.shape == (11, 3, 8, 8)


def test_boxes_cover_what_they_should() -> None:
    boxes = [random_box((60, 40), fractions(word(1, i)), Augment()) for i in range(4000)]
    assert all(0 <= left <= 60 - w and 0 <= top <= 40 - h for left, top, w, h in boxes)
    every_area_fits = Augment(ratio=(1.5, 1.5))
    areas = sorted(
        w * h for _, _, w, h in (random_box((600, 400), fractions(word(2, i)), every_area_fits) for i in range(4000))
    )
    for share in (0, 0.25, 0.5, 0.75, 1):
        assert abs(areas[round(share * 3999)] / 240_000 - (0.08 + 0.92 * share)) < 0.03
    aspects = sorted(math.log(w / h) for _, _, w, h in boxes)
    assert -0.35 < aspects[0] < -0.2
    assert 0.2 < aspects[-1] < 0.35
    assert random_box((100, 10), fractions(0), Augment(scale=(1, 1), ratio=(1, 1))) == (45, 0, 10, 10)
    assert random_box((1, 1), fractions(0), Augment()) == (0, 0, 1, 1)


def test_folders_that_are_wrong(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"image-folder is not there; tried .*nowhere"):
        open_data("image-folder", tmp_path / "nowhere")
    (root / "val" / "dog").mkdir()
    with pytest.raises(UsageError, match="dog: the training split has no class"):
        open_data("image-folder", root).files("valid")
    (root / "test").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        open_data("image-folder", root).files("test")
    (tmp_path / "other" / "train").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no folder for any class"):
        open_data("image-folder", tmp_path / "other")
    with pytest.raises(UsageError, match="resize is 10; it is a whole number from 16"):
        open_data("image-folder", root, size=16, resize=10)


def test_hashes_tell_contents_apart(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_data("image-folder", root)
    assert (first.hashed, first.describe()["sha256"]) == ("content", first.sha256)
    with monkeypatch.context() as patch:
        patch.setattr("sparseift_cli.data.image_files._READ_WHOLE", 10)
        large = open_data("image-folder", root)
        assert large.hashed == "names and sizes"
        assert large.sha256 != first.sha256
    path = root / "train" / "ant" / "0.bmp"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert open_data("image-folder", root).sha256 != first.sha256


def test_without_pillow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(UsageError, match="image folders need Pillow"):
        Batches(open_data("image-folder", root), "train", 4)
