"""Text as tokens: vocabularies, counts for perplexity, windows for training, every token once for evaluation."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparseift_cli.data import Batches, Targets, open_data, write_tokens
from sparseift_cli.data.stdlib import split_files
from sparseift_cli.data.tokens import IGNORE, Stream, TokenSet
from sparseift_cli.errors import UsageError


def counting(n: int, vocab: int = 1000, dtype: torch.dtype = torch.int32) -> TokenSet:
    """A stream whose token i is i."""
    stream = Stream(torch.arange(n).to(dtype))
    return TokenSet("counting", lambda _: stream, split_names=("train", "valid"), vocab=vocab, source="here")


def rows(loader: Batches, epoch: int = 0) -> list[tuple[list[int], list[int]]]:
    return [pair for x, y in loader.epoch(epoch) for pair in zip(x.tolist(), y.tolist(), strict=True)]


# --- windows ---


@pytest.mark.parametrize("n", [2, 5, 16, 17, 18, 33, 100])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_evaluation_predicts_every_token_once(n: int, batch: int) -> None:
    for world in (1, 3):
        loaders = [Batches(counting(n), "valid", batch, seq=8, rank=r, world=world) for r in range(world)]
        found = [pair for loader in loaders for pair in rows(loader)]
        predicted = [(a, b) for x, y in found for a, b in zip(x, y, strict=True) if b != IGNORE]
        assert sorted(b for _, b in predicted) == list(range(1, n))
        assert all(b == a + 1 for a, b in predicted)
        assert all(len(x) == len(y) == 8 for x, y in found)
        assert loaders[0].targets == Targets(n - 1)


def test_training_windows_are_anywhere() -> None:
    loader = Batches(counting(40), "train", 4, 5, seq=8)
    assert loader.steps_per_epoch == 39 // 8 // 4
    found = [pair for epoch in range(1500) for pair in rows(loader, epoch)]
    assert all(y == [v + 1 for v in x] for x, y in found)
    assert all(x == list(range(x[0], x[0] + 8)) for x, _ in found)
    starts = Counter(x[0] for x, _ in found)
    assert set(starts) == set(range(32))
    assert max(starts.values()) < 1.4 * min(starts.values())


def test_training_windows_depend_on_seed_and_step_only() -> None:
    one = rows(Batches(counting(500), "train", 8, 1, seq=8), 2)
    shared = [rows(Batches(counting(500), "train", 8, 1, seq=8, rank=r, world=2), 2) for r in range(2)]
    for step in range(len(one) // 8):
        assert one[8 * step : 8 * step + 8] == shared[0][4 * step : 4 * step + 4] + shared[1][4 * step : 4 * step + 4]
    assert one != rows(Batches(counting(500), "train", 8, 2, seq=8), 2)
    assert one != rows(Batches(counting(500), "train", 8, 1, seq=8), 3)
    loader = Batches(counting(500), "train", 8, 1, seq=8)
    assert torch.equal(loader.batch(2, 6)[0], torch.tensor([x for x, _ in one[48:56]]))


def test_limits_and_refusals() -> None:
    loader = Batches(counting(100), "valid", 2, seq=8, limit=3)
    assert loader.targets == Targets(24)
    assert [len(x) for x, _ in loader] == [2, 1]
    with pytest.raises(UsageError, match="has 8 tokens; a sequence length of 8 needs 9"):
        Batches(counting(8), "train", 1, seq=8)
    with pytest.raises(UsageError, match="counting needs a sequence length"):
        Batches(counting(8), "train", 1)
    with pytest.raises(UsageError, match="4 samples do not fill"):
        Batches(counting(39), "train", 5, seq=8)


# --- bytes and words ---


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "train.txt").write_text(" \n the cat sat \n\n the dog\n")
    (tmp_path / "valid.txt.gz").write_bytes(gzip.compress("the bird é sat\nthe end".encode()))
    return tmp_path


def test_words_with_line_ends(corpus: Path) -> None:
    dataset = open_data("text", corpus, level="words")
    assert dataset.vocabulary == ["<eos>", "the", "cat", "dog", "sat", "<unk>"]
    said = [dataset.vocabulary[i] for i in dataset.stream("train").tokens]
    assert said == ["<eos>", "the", "cat", "sat", "<eos>", "<eos>", "the", "dog", "<eos>"]
    said = [dataset.vocabulary[i] for i in dataset.stream("valid").tokens]
    assert said == ["the", "<unk>", "<unk>", "sat", "<eos>", "the", "<unk>", "<eos>"]
    assert Batches(dataset, "valid", 2, seq=3).targets == Targets(
        7, words=7, bytes=len(" bird é sat\nthe end\n".encode())
    )
    assert Batches(dataset, "train", 1, seq=3, train=False).targets.bytes == len(" the cat sat \n\n the dog\n")
    assert Batches(dataset, "valid", 2, seq=3, limit=1).targets == Targets(3, words=3)


def test_vocabularies_can_be_cut(corpus: Path) -> None:
    dataset = open_data("text", corpus, level="words", max_vocab=4)
    assert dataset.vocabulary == ["the", "cat", "<unk>", "<eos>"]
    assert dataset.vocab == dataset.classes == 4
    assert [dataset.vocabulary[i] for i in dataset.stream("train").tokens][-3:] == ["the", "<unk>", "<eos>"]


def test_bytes(corpus: Path) -> None:
    dataset = open_data("text", corpus)
    text = "the bird é sat\nthe end".encode()
    assert bytes(dataset.stream("valid").tokens.tolist()) == text
    assert Batches(dataset, "valid", 2, seq=3).targets == Targets(len(text) - 1, words=7, bytes=len(text) - 1)
    part = text[: 3 * 3 + 1]
    assert Batches(dataset, "valid", 2, seq=3, limit=3).targets == Targets(9, words=len(part.split()), bytes=9)
    assert dataset.vocab == 256
    assert dataset.held_out == "valid"


def test_one_file_is_split_between_lines(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100)).encode()
    path = tmp_path / "all.txt.gz"
    path.write_bytes(gzip.compress(text))
    dataset = open_data("text", path, valid_percent=20)
    train, valid = (bytes(dataset.stream(s).tokens.tolist()) for s in ("train", "valid"))
    assert train + valid == text
    assert train.endswith(b"\n")
    assert abs(len(valid) / len(text) - 0.2) < 0.02
    assert dict(dataset.splits) == {"train": len(train), "valid": len(valid)}
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_bytes(text)
    with pytest.raises(UsageError, match="no part of the training text can be"):
        open_data("text", tmp_path, valid_percent=20)


def test_text_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="text needs a root"):
        open_data("text")
    with pytest.raises(UsageError, match="text is not there; tried"):
        open_data("text", tmp_path)
    (tmp_path / "valid.txt").write_bytes(b"abc\n")
    (tmp_path / "train.txt").write_bytes(b"abc \xff\n")
    with pytest.raises(UsageError, match="no UTF-8 at byte 4"):
        open_data("text", tmp_path, level="words")
    (tmp_path / "train.txt").write_bytes(b"")
    with pytest.raises(UsageError, match="is empty"):
        open_data("text", tmp_path, level="words")
    with pytest.raises(UsageError, match="train is empty"):
        open_data("text", tmp_path).stream("train")
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"abc" * 100)[:-5])
    (tmp_path / "train.txt").unlink()
    with pytest.raises(UsageError, match=r"train\.txt\.gz: damaged"):
        open_data("text", tmp_path).stream("train")
    with pytest.raises(UsageError, match="unknown level 'chars'"):
        open_data("text", tmp_path, level="chars")


def test_wikitext_2(shared: Path) -> None:
    """The published numbers: words of each split, and the vocabulary."""
    dataset = open_data("wikitext-2", shared / "data")
    assert dict(dataset.splits) == {"train": 2_088_628, "valid": 217_646, "test": 245_569}
    assert dataset.vocab == 33_278
    tokens = dataset.stream("test").tokens
    assert int((tokens == dataset.vocabulary.index("<unk>")).sum()) > 0
    text = gzip.decompress((shared / "data" / "text" / "wikitext-2" / "test.txt.gz").read_bytes()).decode()
    said = " ".join(dataset.vocabulary[i] for i in tokens.tolist())
    assert said == " ".join(" ".join([*line.split(), "<eos>"]) for line in text.split("\n")[:-1])


# --- the standard library ---


def test_stdlib_is_a_function_of_its_files(tmp_path: Path) -> None:
    files = {f"pkg{i % 3}/m{i}.py": f"x = {i}\n" for i in range(200)}
    files |= {"a.py": "a", "pkg0/test/t.py": "t", "site-packages/s.py": "s", "_sysconfigdata_x.py": "l", "b.txt": "b"}
    for name, text in sorted(files.items(), reverse=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    splits = split_files(tmp_path)
    names = {s: [p.relative_to(tmp_path).as_posix() for p in paths] for s, paths in splits.items()}
    assert sorted(names["train"] + names["valid"]) == sorted(
        n for n in files if n == "a.py" or (n.endswith(".py") and "/m" in n)
    )
    assert names["train"] == sorted(names["train"])
    assert 2 <= len(names["valid"]) <= 25
    dataset = open_data("stdlib", tmp_path)
    assert bytes(dataset.stream("valid").tokens.tolist()).decode() == "".join(files[n] for n in names["valid"])
    (tmp_path / "pkg1" / "new.py").write_text("n")
    after = split_files(tmp_path)
    assert {s: set(paths) - set(after[s]) for s, paths in splits.items()} == {"train": set(), "valid": set()}


def test_stdlib_is_here() -> None:
    dataset = open_data("stdlib")
    assert dataset.splits["train"] > 5_000_000
    assert dataset.splits["valid"] > 100_000
    assert dataset.sha256 == open_data("stdlib").sha256
    x, y = Batches(dataset, "train", 4, seq=64).batch(0, 0)
    assert x.shape == y.shape == (4, 64)
    with pytest.raises(UsageError, match="no sources of Python's standard library"):
        open_data("stdlib", Path(__file__).parent / "nowhere")


# --- token files ---


@pytest.mark.parametrize(("vocab", "dtype"), [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_token_files_read_back(vocab: int, dtype: str, tmp_path: Path) -> None:
    train = torch.randint(0, vocab, (500,), generator=torch.Generator().manual_seed(0))
    train[7] = vocab - 1
    valid = Stream(torch.arange(100, dtype=torch.uint8), words=lambda: 30, bytes=lambda: 200)
    write_tokens(tmp_path, {"train": train, "valid": valid}, vocab=vocab)
    assert json.loads((tmp_path / "tokens.json").read_text())["dtype"] == dtype
    dataset = open_data("tokens", tmp_path)
    assert (dataset.vocab, dict(dataset.splits)) == (vocab, {"train": 500, "valid": 100})
    found = torch.cat([y for _, y in Batches(dataset, "train", 4, train=False, seq=16)]).flatten()
    assert torch.equal(found[found != IGNORE], train[1:])
    assert Batches(dataset, "valid", 4, seq=16).targets == Targets(99, words=30, bytes=200)
    again = tmp_path / "again"
    write_tokens(again, {s: dataset.stream(s) for s in dataset.split_names}, vocab=vocab)
    assert open_data("tokens", again).sha256 == dataset.sha256


def test_token_files_are_mapped_not_read(tmp_path: Path) -> None:
    """A sparse file of 8 GB opens at once; what is written into the tensor stays out of the file."""
    with (tmp_path / "train.bin").open("wb") as file:
        file.truncate(8 << 30)
    header = {
        "format": "sparseift.tokens/1",
        "dtype": "uint32",
        "vocab": 10,
        "splits": {"train": {"file": "train.bin", "tokens": 2 << 30}},
    }
    (tmp_path / "tokens.json").write_text(json.dumps(header))
    dataset = open_data("tokens", tmp_path)
    loader = Batches(dataset, "train", 4, seq=128)
    assert loader.batch(5, 1000)[0].sum() == 0
    assert loader.steps_per_epoch == ((2 << 30) - 1) // 128 // 4
    dataset.stream("train").tokens[0] = 1
    with (tmp_path / "train.bin").open("rb") as file:
        assert file.read(4) == bytes(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no header of token files"),
        ({"dtype": "float"}, "unknown dtype 'float'"),
        ({"vocab": 70_000}, "vocab is 70000"),
        ({"splits": {}}, "no header"),
        ({"splits": {"train": {"file": "../x", "tokens": 5}}}, "names no file beside the header"),
        ({"splits": {"train": {"file": "train.bin", "tokens": 5}}}, "has 8 bytes; 5 tokens need 10"),
        ({"splits": {"train": {"file": "gone.bin", "tokens": 5}}}, "is not there"),
        ({"splits": {"train": {"file": "train.bin", "tokens": 4, "words": "many"}}}, "words of train is 'many'"),
    ],
)
def test_wrong_headers(change, message: str, tmp_path: Path) -> None:
    write_tokens(tmp_path, {"train": torch.tensor([1, 2, 3, 400])}, vocab=401)
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=message) as caught:
        open_data("tokens", tmp_path)
    assert str(path) in caught.value.message
    path.write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        open_data("tokens", tmp_path)


@pytest.mark.parametrize("tokens", [torch.tensor([0, 5]), torch.tensor([0, -1]), torch.tensor([0, -1]).to(torch.int16)])
def test_tokens_beyond_the_vocabulary(tokens: Tensor, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is outside a vocabulary of 5"):
        write_tokens(tmp_path, {"train": tokens}, vocab=5)
    write_tokens(tmp_path, {"train": torch.tensor([1, 4])}, vocab=5)
    (tmp_path / "train.bin").write_bytes(b"\x01\x05")
    with pytest.raises(UsageError, match="a token 5 in train; the vocabulary has 5"):
        open_data("tokens", tmp_path).describe()


# --- made-up text ---


def test_synthetic_text_is_the_same_everywhere() -> None:
    dataset = open_data("synthetic-text", vocab=16, train=5000, valid=100)
    assert dataset.sha256 == "36cb99e35c36cdeef4c711628e584cfe64a055768a6f7279dbdbd3e370197ba0"
    assert dict(dataset.splits) == {"train": 5000, "valid": 100}


@pytest.mark.parametrize("order", [1, 2])
def test_synthetic_text_has_the_entropy_it_says(order: int) -> None:
    dataset = open_data("synthetic-text", vocab=8, order=order, train=1 << 18)
    tokens = dataset.stream("train").tokens.tolist()
    steps = 1 << 18 >> 10
    after: dict[tuple[int, ...], Counter[int]] = {}
    for start in range(0, len(tokens), steps):
        for i in range(start + order, start + steps):
            after.setdefault(tuple(tokens[i - order : i]), Counter())[tokens[i]] += 1
    total = sum(sum(c.values()) for c in after.values())
    bits = sum(n * math.log2(sum(c.values()) / n) for c in after.values() for n in c.values()) / total
    assert abs(bits - 1.75) < 0.01
    assert len(after) == 8**order
