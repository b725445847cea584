"""Files of a text: which are read, in which order, and how large ones are unpacked once and memory-mapped."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_cli.data import Batches, open_data, text_files
from sparseift_cli.data.places import announcing
from sparseift_cli.errors import UsageError

WORDS = random.Random(0).choices(["int", "return", "x", "\n", "{\n", "\t}"], k=40_000)
TEXT = " ".join(WORDS).encode()
HALVES = TEXT[:90_001], TEXT[90_001:]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of unpacked texts, into which texts of any size go."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(text_files, "HELD", 0)
    monkeypatch.setattr(text_files, "_HELD_PACKED", 0)
    return tmp_path / "home" / ".cache" / "sparseift" / "texts"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A train file in two parts, and a valid file."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, half in enumerate(HALVES):
        (folder / f"train-{i}.bin.xz").write_bytes(lzma.compress(half))
    (folder / "valid.bin.xz").write_bytes(lzma.compress(b"void f(void)\n"))
    return folder


def text_of(folder: Path, split: str = "train") -> bytes:
    return open_data("text", folder).stream(split).tokens.numpy().tobytes()


def test_numbered_files_are_one_text(corpus: Path) -> None:
    dataset = open_data("text", corpus)
    assert dict(dataset.splits) == {"train": len(TEXT), "valid": 13}
    assert text_of(corpus) == TEXT
    for i in range(2, 11):  # 10 comes after 9, not after 1
        (corpus / f"train-{i}.txt").write_bytes(f"<{i}>".encode())
    assert text_of(corpus) == TEXT + b"<2><3><4><5><6><7><8><9><10>"
    (corpus / "train-3.txt").unlink()
    with pytest.raises(UsageError, match=r"a file train-3 is missing before train-10\.txt"):
        open_data("text", corpus)
    (corpus / "train.raw.gz").write_bytes(gzip.compress(b"whole"))
    assert text_of(corpus) == b"whole"


def test_one_file_in_any_packing_is_the_same_data(tmp_path: Path) -> None:
    found = set()
    for ending, pack in {".txt": bytes, ".bin": bytes, ".txt.gz": gzip.compress, ".tokens.xz": lzma.compress}.items():
        folder = tmp_path / ending
        folder.mkdir()
        (folder / f"train{ending}").write_bytes(pack(TEXT))
        found.add(open_data("text", folder).sha256)
    assert len(found) == 1


def test_token_files_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(TEXT)
    assert text_of(tmp_path)
    (tmp_path / "tokens.json").write_text("{}")
    with pytest.raises(UsageError, match="text is not there"):
        open_data("text", tmp_path)


def test_the_cache_gives_the_same_batches_and_counts(
    corpus: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen() -> tuple[Any, ...]:
        dataset = open_data("text", corpus)
        x, y = Batches(dataset, "train", 8, 3, seq=64).batch(1, 2)
        return x.tolist(), y.tolist(), dataset.sha256, Batches(dataset, "train", 8, seq=64, train=False).targets

    mapped = seen()
    assert len(list(cached.glob("*.bin"))) == 2  # train and valid
    monkeypatch.setattr(text_files, "_HELD_PACKED", 1 << 23)
    assert seen() == mapped
    assert mapped[-1].words == len(TEXT.split()) + TEXT.count(b"\n")


def test_a_text_is_unpacked_once_and_says_so(corpus: Path, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with announcing(said.append):
        assert text_of(corpus) == TEXT
        (line,) = said
        assert line.startswith("unpacking train-0.bin.xz, train-1.bin.xz into ") and line.endswith(", once")
        assert text_of(corpus) == TEXT and len(said) == 1
        (file,) = cached.glob("*.bin")
        assert sorted(path.suffix for path in cached.iterdir()) == [".bin", ".json", ".lock"]
        recorded = json.loads(file.with_suffix(".json").read_text())
        assert recorded["bytes"] == len(TEXT) and recorded["sha256"] == hashlib.sha256(TEXT).hexdigest()
        for broken in (TEXT[:-1], b"?" + TEXT[1:]):  # cut short, altered: made again
            file.write_bytes(broken)
            said.clear()
            assert text_of(corpus) == TEXT and len(said) == 1


@pytest.mark.parametrize("altered", [False, True])
def test_unpacking_goes_on_where_it_was_stopped(
    corpus: Path, cached: Path, monkeypatch: pytest.MonkeyPatch, altered: bool
) -> None:
    """A file that was finished is not unpacked again, unless what was written is not what it was."""
    read: list[str] = []
    original = text_files.file_blocks

    def stopping(path: Path) -> Any:
        read.append(path.name)
        for block in original(path):
            yield block
            if path.name == "train-1.bin.xz" and len(read) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(text_files, "file_blocks", stopping)
    with pytest.raises(KeyboardInterrupt):
        text_of(corpus)
    (part,) = cached.glob("*.part")
    assert part.read_bytes() == HALVES[0]
    if altered:
        part.write_bytes(b"?" + HALVES[0][1:])
    assert text_of(corpus) == TEXT
    assert read[2:] == (["train-0.bin.xz"] if altered else []) + ["train-1.bin.xz"]
    assert not list(cached.glob("*.part*"))


@pytest.mark.parametrize("into_cache", [False, True])
@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (".bin.xz", lzma.compress(TEXT)[:-40]),
        (".bin.xz", b"no xz at all"),
        (".txt.xz", gzip.compress(TEXT)),
        (".txt.gz", gzip.compress(TEXT)[:-5]),
        (".txt.gz", b"no gz at all"),
    ],
)
def test_damaged_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, content: bytes, into_cache: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if into_cache:
        monkeypatch.setattr(text_files, "_HELD_PACKED", 0)
    (tmp_path / f"train{ending}").write_bytes(content)
    with pytest.raises(UsageError, match=rf"train\{ending}: damaged, or no ") as caught:
        open_data("text", tmp_path / f"train{ending}")
    assert "\n" not in caught.value.message
    assert not [p for p in tmp_path.rglob("home/**/*") if p.is_file() and p.suffix != ".lock"]


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, "No space left on device" if number == errno.ENOSPC else "Permission denied")

    return fail


def test_a_full_disk_is_one_line(corpus: Path, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files.os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(
        UsageError, match=r"cannot write train-0.bin.xz, train-1.bin.xz into .*: No space left"
    ) as caught:
        text_of(corpus)
    assert "make room there, or unpack the files yourself" in str(caught.value.hint)
    assert not list(cached.glob("*.part*"))


def test_a_cache_that_cannot_be_made(corpus: Path, cached: Path) -> None:
    cached.parent.mkdir(parents=True)
    cached.write_text("a file")
    with pytest.raises(UsageError, match=r"cannot write train-0.bin.xz, train-1.bin.xz into .*: File exists"):
        text_of(corpus)


def test_small_files_that_unpack_to_much_go_into_the_cache(
    corpus: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_HELD_PACKED", 1 << 23)
    assert text_of(corpus) == TEXT and not cached.exists()
    monkeypatch.setattr(text_files, "_UNPACKS_TO", 1000)
    assert text_of(corpus) == TEXT and len(list(cached.glob("*.bin"))) == 1


def test_plain_files_are_mapped(tmp_path: Path, cached: Path) -> None:
    """8 GB of a sparse file, whose end is held out."""
    with (tmp_path / "all.txt").open("wb") as file:
        file.truncate(8 << 30)
        file.seek((8 << 30) - (1 << 20))
        file.write(b"end\n" * 1000)
    dataset = open_data("text", tmp_path / "all.txt", valid_percent=1)
    train, valid = (dataset.stream(split).tokens for split in ("train", "valid"))
    assert len(train) + len(valid) == 8 << 30
    assert valid[:4].tolist() == list(b"end\n") and train[-4:].tolist() == list(b"end\n")
    assert not cached.exists()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_words_are_counted_by_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"  a bc\t\tdef\n\nghij  k\x0b\x0cl\n m"
    tensor = torch.tensor(list(text), dtype=torch.uint8)
    monkeypatch.setattr(text_files.pieces, "__defaults__", (size,))
    assert b"".join(text_files.pieces(tensor)) == text
    assert text_files.count_words(tensor) == len(text.split()) + text.count(b"\n") == 10


def test_a_run_says_that_it_unpacks(sparseift: Any, corpus: Path, cached: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: bytes_gpt\ndata: {{name: text, root: {corpus}}}\n"
        "training: {steps: 1, batch_size: 2, device: cpu}\nevaluation: {limit: 1}\n"
    )
    for said in (1, 0):
        code, _, err = sparseift("train", str(path), "--runs", str(tmp_path / "runs"))
        assert code == 0 and err.count("unpacking train-0.bin.xz, train-1.bin.xz into ") == said
