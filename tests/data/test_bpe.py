"""Text as subwords: vocabularies that are trained or given, ids in the cache, and what they count. Needs the package tokenizers."""

from __future__ import annotations

import errno
import gzip
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_cli.data import Batches, bpe, open_data
from sparseift_cli.data.places import announcing
from sparseift_cli.errors import UsageError
from sparseift_cli.runs.metrics import read_metrics

try:
    import tokenizers  # pyright: ignore[reportMissingImports]
except ImportError:
    tokenizers = None

needs_tokenizers = pytest.mark.skipif(tokenizers is None, reason="needs the package tokenizers")
WORDS = ["the", "cat", "sat", "on", "mats", "été", "\n", "x = 1;", "\t", "  "]


def text(seed: int, words: int) -> bytes:
    return " ".join(random.Random(seed).choices(WORDS, k=words)).encode()


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train and valid text; the cache is empty."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.txt.gz").write_bytes(gzip.compress(text(0, 6000)))
    (folder / "valid.txt").write_bytes(text(1, 500))
    return folder


def cache(corpus: Path) -> Path:
    return corpus.parent / "home" / ".cache" / "sparseift" / "tokens"


def ids(dataset: Any, split: str) -> list[int]:
    return [int(i) & 0xFFFF for i in dataset.stream(split).tokens]


@needs_tokenizers
def test_a_vocabulary_is_trained_and_gives_the_text_back(corpus: Path) -> None:
    dataset = open_data("text", corpus, level="bpe", max_vocab=300)
    assert (dataset.name, dataset.source, dataset.vocab, dataset.kind) == ("text", str(corpus), 300, "tokens")
    assert dataset.stream("train").tokens.dtype == torch.int16
    (folder,) = (path for path in cache(corpus).iterdir() if path.is_dir())
    vocabulary = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for split, content in (("train", text(0, 6000)), ("valid", text(1, 500))):
        assert vocabulary.decode(ids(dataset, split), skip_special_tokens=False) == content.decode()
    first = len(vocabulary.decode(ids(dataset, "valid")[:1]).encode())
    targets = Batches(dataset, "valid", 4, seq=16).targets
    content = text(1, 500)
    assert targets.tokens == len(ids(dataset, "valid")) - 1 < len(content) / 2
    assert (targets.words, targets.bytes) == (len(content.split()) + content.count(b"\n"), len(content) - first)


@needs_tokenizers
def test_ids_are_made_once_and_again_where_they_are_damaged(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def opened(**options: Any) -> str:
        return open_data("text", corpus, level="bpe", **options).sha256

    with announcing(said.append):
        before = opened(max_vocab=280)
        (line,) = said
        assert line.startswith("writing the ids that a byte-level BPE vocabulary of 280 gives for ")
        assert opened(max_vocab=280) == before and len(said) == 1
        (folder,) = (path for path in cache(corpus).iterdir() if path.is_dir())
        for name in ("train.bin", "tokenizer.json", "tokens.json"):
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[:-1] + b"?")
            said.clear()
            assert opened(max_vocab=280) == before and len(said) == 1
        assert opened(max_vocab=290) != before
        (corpus / "valid.txt").write_bytes(text(2, 500))
        assert opened(max_vocab=280) != before
    assert open_data("tokens", folder).sha256 == before  # what was made is a data set by itself
    assert not list(cache(corpus).glob(".*"))


@needs_tokenizers
def test_ids_do_not_depend_on_the_pieces(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_data("text", corpus, level="bpe", max_vocab=300)
    expected = {split: ids(whole, split) for split in ("train", "valid")}
    monkeypatch.setattr(bpe, "_PIECE", 100)
    monkeypatch.setattr(bpe, "_FORMAT", 2)  # another name in the cache
    again = open_data("text", corpus, level="bpe", max_vocab=300)
    assert {split: ids(again, split) for split in ("train", "valid")} == expected


@needs_tokenizers
def test_a_tokenizer_file_is_read(corpus: Path) -> None:
    trained = open_data("text", corpus, level="bpe", max_vocab=300)
    (folder,) = (path for path in cache(corpus).iterdir() if path.is_dir())
    given = open_data("text", corpus, level="bpe", tokenizer=folder / "tokenizer.json")
    assert given.sha256 == trained.sha256
    with pytest.raises(UsageError, match="the tokenizer has its own"):
        open_data("text", corpus, level="bpe", tokenizer=folder / "tokenizer.json", max_vocab=300)
    (corpus / "no.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no\.json: no tokenizer.json that tokenizers .* reads: ") as caught:
        open_data("text", corpus, level="bpe", tokenizer=corpus / "no.json")
    assert "\n" not in caught.value.message
    with pytest.raises(UsageError, match=r"gone\.json: No such file"):
        open_data("text", corpus, level="bpe", tokenizer=corpus / "gone.json")
    with pytest.raises(UsageError, match="a whole number from 256"):
        open_data("text", corpus, level="bpe", max_vocab=255)


@needs_tokenizers
def test_what_is_no_utf8_and_what_loses_text_are_said(corpus: Path) -> None:
    (corpus / "valid.txt").write_bytes(b"the cat \xff\xfe sat \xe2\x82 on\n" * 3)
    said: list[str] = []
    with announcing(said.append):
        open_data("text", corpus, level="bpe", max_vocab=300)
        assert said[1:] == ["warning: 9 times the split valid is no UTF-8; it is read as U+FFFD there"]
        lossy = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "<unk>": 1}, unk_token="<unk>"))
        lossy.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        lossy.save(str(corpus / "lossy.json"))
        said.clear()
        open_data("text", corpus, level="bpe", tokenizer=corpus / "lossy.json")
        assert sum("does not give the text of the split" in line for line in said) == 2


@needs_tokenizers
def test_a_large_vocabulary_has_ids_of_32_bits(corpus: Path) -> None:
    words = {f"w{i}": i for i in range(70_000)} | {"the": 70_000, "<unk>": 70_001}
    large = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    large.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    large.save(str(corpus / "large.json"))
    dataset = open_data("text", corpus, level="bpe", tokenizer=corpus / "large.json")
    assert dataset.vocab == 70_002 and dataset.stream("train").tokens.dtype == torch.int32
    assert set(dataset.stream("train").tokens.tolist()) == {70_000, 70_001}


@needs_tokenizers
def test_a_full_disk_is_one_line(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(bpe, "write_header", full)
        with pytest.raises(UsageError, match=r"cannot write into .*tokens: No space left on device"):
            open_data("text", corpus, level="bpe", max_vocab=256)
    assert [path.suffix for path in cache(corpus).iterdir()] == [".lock"]
    assert open_data("text", corpus, level="bpe", max_vocab=256).vocab == 256


def test_without_the_package_one_line_says_what_to_install(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match="level=bpe needs the package tokenizers, which is not installed") as caught:
        open_data("text", corpus, level="bpe")
    assert caught.value.hint == "pip install tokenizers"


@pytest.mark.parametrize("level", ["bytes", "words"])
def test_a_tokenizer_is_for_subwords(corpus: Path, level: str) -> None:
    with pytest.raises(UsageError, match=f"a tokenizer is for level=bpe; this is level={level}"):
        open_data("text", corpus, level=level, tokenizer="tokenizer.json")


@pytest.mark.parametrize("size", [1, 2, 3, 50, 1000])
def test_pieces_end_where_words_end(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = text(3, 200)
    monkeypatch.setattr(bpe, "_PIECE", size)
    found = list(bpe.whole_pieces(torch.tensor(list(content), dtype=torch.uint8)))
    assert b"".join(found) == content
    assert all(not piece[-1:].isspace() for piece in found[:-1])
    assert all(piece[:1].isspace() for piece in found[1:])


def test_a_text_without_spaces_is_cut_between_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_PIECE", 5)
    monkeypatch.setattr(bpe, "_LARGEST_PIECE", 10)
    content = ("é€𝄞" * 50).encode()
    found = list(bpe.whole_pieces(torch.tensor(list(content), dtype=torch.uint8)))
    assert b"".join(piece.decode().encode() for piece in found) == content and len(found) > 20


@needs_tokenizers
def test_a_run_reports_each_perplexity_with_its_unit(
    sparseift: Any, corpus: Path, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)  # `tests.helpers.nets` is found from here
    path = tmp_path / "recipe.yaml"
    path.write_text(
        'model: "tests.helpers.nets:letters"\n'
        f"data: {{name: text, root: {corpus}, level: bpe, max_vocab: 256}}\n"
        "training: {steps: 2, batch_size: 2, device: cpu}\n"
    )
    runs = tmp_path / "runs"
    code, out, err = sparseift("train", str(path), "--runs", str(runs), "--json")
    assert code == 0 and err.count("writing the ids that a byte-level BPE vocabulary of 256 gives for ") == 1
    (result,) = json.loads(out)["runs"]
    *_, last = read_metrics(Path(result["path"]) / "metrics.jsonl")
    targets = Batches(open_data("text", corpus, level="bpe", max_vocab=256), "valid", 2, seq=4).targets
    total = last["loss"] * targets.tokens
    assert last["perplexity_per_token"] == pytest.approx(math.exp(last["loss"]))
    assert last["perplexity_per_word"] == pytest.approx(math.exp(total / targets.words))
    assert last["bits_per_byte"] == pytest.approx(total / math.log(2) / targets.bytes)
    columns = "perplexity_per_token,perplexity_per_word,bits_per_byte"
    code, out, _ = sparseift("report", str(runs), "--format", "csv", "--columns", columns)
    assert code == 0 and out.splitlines()[0] == columns and len(out.splitlines()[1].split(",")) == 3
    path.write_text(path.read_text().replace("256}", "300}"))
    code, _, err = sparseift("train", str(path), "--runs", str(runs))
    assert code == 2 and "or let a smaller one be trained: data.max_vocab=256" in err
