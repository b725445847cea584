"""Image sets from files in their true formats, written here: what is read, and every kind of damage."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import struct
import tarfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseift_cli.data import open_data
from sparseift_cli.data.cifar import UnreadableArrays, read_arrays
from sparseift_cli.data.mnist import read_idx
from sparseift_cli.errors import UsageError

VERSIONS = {
    "cifar10": ("cifar-10-batches-", {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}),
    "cifar100": ("cifar-100-", {"train": ["train"], "test": ["test"]}),
}


def made_up(name: str, n: int = 4) -> dict[str, tuple[np.ndarray, list[int]]]:
    """A small file's worth of pixels [n, 3072] and labels for every file of a CIFAR version."""
    random = np.random.default_rng(0)
    classes = 100 if name == "cifar100" else 10
    return {
        file: (random.integers(0, 256, (n, 3072), dtype=np.uint8), random.integers(0, classes, n).tolist())
        for files in VERSIONS[name][1].values()
        for file in files
    }


def python2_pickle(pixels: np.ndarray, labels: list[int], label_key: str) -> bytes:
    """As cPickle of Python 2 wrote the official archives, protocol 2: text and bytes are both STRINGs."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + b"M" + struct.pack("<H", len(labels)) + b"M\x00\x0c\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
    )
    return b"\x80\x02}(" + text(b"filenames") + b"]" + text(label_key.encode()) + listed + text(b"data") + array + b"u."


def python_file(name: str, pixels: np.ndarray, labels: list[int], protocol: int | None) -> bytes:
    key = "fine_labels" if name == "cifar100" else "labels"
    if protocol is None:
        return python2_pickle(pixels, labels, key)
    return pickle.dumps({b"batch_label": b"x", key.encode(): labels, b"data": pixels}, protocol=protocol)


def binary_file(name: str, pixels: np.ndarray, labels: list[int]) -> bytes:
    before = [bytes([7, label]) if name == "cifar100" else bytes([label]) for label in labels]
    return b"".join(head + row.tobytes() for head, row in zip(before, pixels, strict=True))


def write(name: str, form: str, root: Path, protocol: int | None = None) -> Path:
    """A CIFAR version below `root` as a folder of one form; gives the folder."""
    suffix = {"python": "py" if name == "cifar10" else "python", "binary": "bin" if name == "cifar10" else "binary"}
    folder = root / (VERSIONS[name][0] + suffix[form])
    folder.mkdir(parents=True)
    for file, (pixels, labels) in made_up(name).items():
        if form == "python":
            (folder / file).write_bytes(python_file(name, pixels, labels, protocol))
        else:
            (folder / f"{file}.bin").write_bytes(binary_file(name, pixels, labels))
    return folder


def packed(folder: Path, name: str) -> Path:
    with tarfile.open(folder.parent / name, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    return folder.parent / name


def expected(name: str, split: str) -> tuple[Tensor, Tensor]:
    files = [made_up(name)[file] for file in VERSIONS[name][1][split]]
    pixels = np.concatenate([p for p, _ in files]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(pixels), torch.tensor([label for _, labels in files for label in labels])


def check(name: str, root: Path) -> str:
    dataset = open_data(name, root)
    for split in ("train", "test"):
        for got, want in zip(dataset.images(split), expected(name, split), strict=True):
            assert torch.equal(got, want)
    return dataset.sha256


# --- CIFAR ---


@pytest.mark.parametrize("name", VERSIONS)
def test_every_form_reads_alike(name: str, tmp_path: Path) -> None:
    """Binary and python, folder and archive, named by its folder, by its parent and by itself: one content, one hash."""
    hashes = set()
    dashed = "cifar-10" if name == "cifar10" else "cifar-100"
    for form in ("python", "binary"):
        folder = write(name, form, tmp_path / form)
        hashes |= {check(name, tmp_path / form), check(name, folder)}
        archive = packed(folder, f"{dashed}-{form}.tar.gz")
        alone = tmp_path / form / "alone"
        alone.mkdir()
        archive.rename(alone / archive.name)
        hashes |= {check(name, alone), check(name, alone / archive.name)}
    assert len(hashes) == 1


@pytest.mark.parametrize("protocol", [None, 2, 3, 4])
def test_pickles_of_python_2_and_3(protocol: int | None, tmp_path: Path) -> None:
    write("cifar100", "python", tmp_path, protocol)
    check("cifar100", tmp_path)


def test_cifar_describes_itself(tmp_path: Path) -> None:
    write("cifar10", "binary", tmp_path)
    dataset = open_data("CIFAR-10", tmp_path)
    assert (dataset.kind, dataset.shape, dataset.classes) == ("image", (3, 32, 32), 10)
    assert dict(dataset.splits) == {"train": 20, "test": 4}
    assert dataset.held_out == "test"
    assert dataset.augment is not None
    assert set(dataset.describe()) >= {"name", "kind", "source", "splits", "sha256", "hashed"}
    with pytest.raises(UsageError, match="unknown split of cifar10 'valid'"):
        dataset.check_split("valid")


class Evil:
    def __reduce__(self):
        return (os.system, ("echo ran > ran",))


@pytest.mark.parametrize("payload", [Evil(), {"data": Evil()}, np.dtype, print, [np.float64(1)]])
def test_pickles_run_nothing(payload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write("cifar100", "python", tmp_path)
    (folder / "test").write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(UsageError) as caught:
        open_data("cifar100", tmp_path).images("test")
    assert "not opened" in caught.value.message or "no dict" in caught.value.message
    assert "\n" not in caught.value.message
    assert not (tmp_path / "ran").exists()


def test_every_cut_of_a_pickle_is_one_line(tmp_path: Path) -> None:
    pixels, labels = made_up("cifar100", 1)["test"]
    whole = python2_pickle(pixels, labels, "fine_labels")
    folder = write("cifar100", "python", tmp_path)
    for cut in [*range(0, 260, 7), len(whole) - 1]:
        (folder / "test").write_bytes(whole[:cut])
        with pytest.raises(UsageError, match=r"damaged|no dict|not opened") as caught:
            open_data("cifar100", tmp_path).images("test")
        assert str(folder / "test") in caught.value.message
        assert "\n" not in caught.value.message


def test_flipped_bytes_never_crash() -> None:
    """Whatever a pickle says, it is a dict or UnreadableArrays; nothing else comes out."""
    pixels, labels = made_up("cifar100", 1)["test"]
    whole = bytearray(python2_pickle(pixels[:, :48], labels, "fine_labels"))
    random = np.random.default_rng(1)
    for _ in range(2000):
        damaged = bytearray(whole)
        damaged[int(random.integers(len(whole)))] = int(random.integers(256))
        with contextlib.suppress(UnreadableArrays):
            assert isinstance(read_arrays(damaged), dict)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"fine_labels": [1]}, "no array `data`"),
        ({b"fine_labels": [1], b"data": np.zeros((1, 3072), np.float32)}, "its array is f4"),
        ({b"fine_labels": [1], b"data": np.zeros((1, 3071), np.uint8)}, "its array is u1 "),
        ({b"fine_labels": [1, 2], b"data": np.zeros((1, 3072), np.uint8)}, "its array is u1 "),
        ({b"fine_labels": [100], b"data": np.zeros((1, 3072), np.uint8)}, "no whole numbers from 0 to 99"),
        ({b"fine_labels": ["a"], b"data": np.zeros((1, 3072), np.uint8)}, "no whole numbers"),
        ({b"fine_labels": [], b"data": np.zeros((0, 3072), np.uint8)}, "not opened"),
    ],
)
def test_pickles_of_something_else(content, message: str, tmp_path: Path) -> None:
    folder = write("cifar100", "python", tmp_path)
    (folder / "test").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UsageError, match=message):
        open_data("cifar100", tmp_path).images("test")


def test_damaged_binaries_and_archives(tmp_path: Path) -> None:
    folder = write("cifar10", "binary", tmp_path / "a")
    test = folder / "test_batch.bin"
    test.write_bytes(test.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"not whole records of 3,073"):
        open_data("cifar10", folder).images("test")
    test.write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(UsageError, match="a label 10 in test"):
        open_data("cifar10", folder).images("test")
    archive = packed(folder, "cifar-10-binary.tar.gz")
    whole = archive.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 9):
        archive.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match=r"damaged|lacks") as caught:
            open_data("cifar10", archive).images("test")
        assert "\n" not in caught.value.message
    archive.write_bytes(b"<html>not found</html>")
    with pytest.raises(UsageError, match="damaged"):
        open_data("cifar10", archive).images("test")


def test_archives_without_their_members(tmp_path: Path) -> None:
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("cifar-100-binary/test.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("other"), io.BytesIO())
    with pytest.raises(UsageError, match=r"lacks test\.bin"):
        open_data("cifar100", path).images("test")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the script leaves its files to the collector
def test_the_real_cifar_100(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test split of the official set, in the bytes of the official pickle."""
    monkeypatch.syspath_prepend(shared / "data" / "cifar-100")
    pixels, fine = import_module("cifar100_pack").load("test")
    with np.load(shared / "data" / "cifar-100" / "heads.npz") as heads:
        head = heads["test"].tobytes()
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "test").write_bytes(head + pixels.tobytes() + b"tbu.")
    images, labels = open_data("cifar100", tmp_path).images("test")
    assert images.shape == (10_000, 3, 32, 32)
    assert torch.equal(images, torch.from_numpy(pixels))
    assert labels.tolist() == fine.tolist()
    assert torch.bincount(labels).tolist() == [100] * 100


# --- MNIST ---


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def write_mnist(folder: Path, *, zipped: bool, dot: bool = False) -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    arrays = {}
    for prefix, n in (("train", 6), ("t10k", 3)):
        arrays[f"{prefix}-images-idx3-ubyte"] = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = random.integers(0, 10, n, dtype=np.uint8)
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        name = name.replace("-idx", ".idx") if dot else name
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return arrays


@pytest.mark.parametrize(
    ("zipped", "dot", "place"), [(True, False, "MNIST/raw"), (False, True, "mnist"), (True, True, "")]
)
def test_mnist_reads_what_was_written(zipped: bool, dot: bool, place: str, tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path / "root" / place, zipped=zipped, dot=dot)
    dataset = open_data("mnist", tmp_path / "root")
    images, labels = dataset.images("test")
    assert torch.equal(images[:, 0], torch.from_numpy(arrays["t10k-images-idx3-ubyte"]))
    assert torch.equal(labels, torch.from_numpy(arrays["t10k-labels-idx1-ubyte"]).long())
    assert dict(dataset.splits) == {"train": 6, "test": 3}
    assert dataset.shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no idx file"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 1, 0]), "no idx file"),
        (bytes([0, 0, 8, 3]) + bytes(12), "0 bytes for 0 x 0 x 0"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2]), "2 bytes for 3"),
        (bytes([0, 0, 8, 1, 0xFF, 0xFF, 0xFF, 0xFF, 1]), "1 bytes for 4294967295"),
    ],
)
def test_damaged_idx(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_idx(tmp_path / "x", 3 if data[3:4] == b"\x03" else 1)


def test_damaged_gzip(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", zipped=True)
    path = tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match="damaged"):
        open_data("mnist", tmp_path).images("test")
    path.unlink()
    path.with_suffix("").mkdir()
    with pytest.raises(UsageError, match="mnist is not there"):
        open_data("mnist", tmp_path)


def test_unpacking_stops_at_a_limit(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", zipped=True)
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(70 << 20), 1))
    with pytest.raises(UsageError, match="more than 67,108,864 bytes"):
        open_data("mnist", tmp_path).images("test")


def test_the_real_mnist(shared: Path) -> None:
    dataset = open_data("mnist", shared / "data")
    images, labels = dataset.images("test")
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert images.shape == (10_000, 1, 28, 28)


# --- digits and made-up images ---


def test_digits_from_a_file_in_their_format(tmp_path: Path) -> None:
    rows = [",".join(f"{v:e}" for v in [(i + j) % 17 for j in range(64)] + [i % 10]) for i in range(100)]
    (tmp_path / "digits.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    dataset = open_data("digits", tmp_path)
    assert dict(dataset.splits) == {"train": 82, "test": 18}
    together = torch.cat([dataset.images(s)[0] for s in ("train", "test")])
    assert len(together.flatten(1).unique(dim=0)) == 17
    assert set(together.unique().tolist()) == {v * 255 // 16 for v in range(17)}


@pytest.mark.parametrize("text", ["1,2,3", "a,b", "", ",".join(["17"] * 65), "1," * 64 + "x"])
def test_digits_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "digits.csv.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(UsageError, match=r"digits\.csv\.gz: n"):
        open_data("digits", tmp_path).images("test")


def test_digits_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    theirs = sklearn.load_digits()
    dataset = open_data("digits")
    assert sum(dataset.splits.values()) == len(theirs.target) == 1797


def test_synthetic_images_are_the_same_everywhere() -> None:
    dataset = open_data("synthetic-images", classes=3, size=8, train=30, test=9)
    assert dataset.sha256 == "b1884da0e10057884da6c410699c9d6cc8144a29adbfb65dc5b8ccc48785f42a"
    images, labels = dataset.images("train")
    assert images.shape == (30, 3, 8, 8)
    assert torch.bincount(labels).tolist() == [10, 10, 10]
    centres = torch.stack([images[labels == c].float().mean(0) for c in range(3)])
    test, truth = dataset.images("test")
    nearest = (test.float()[:, None] - centres).flatten(2).pow(2).sum(2).argmin(1)
    assert torch.equal(nearest, truth)
    assert open_data("synthetic-images", classes=3, size=8, train=30, test=9, seed=1).sha256 != dataset.sha256


def test_synthetic_images_refuse_nonsense() -> None:
    with pytest.raises(UsageError, match="classes is 1; it is a whole number from 2"):
        open_data("synthetic-images", classes=1)
    with pytest.raises(UsageError, match="size is 'big'"):
        open_data("synthetic-images", size="big")
