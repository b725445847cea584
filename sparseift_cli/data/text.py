"""Plain text, by bytes, words or subwords: files of one's own, and WikiText as its authors tokenised it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, one_of
from .places import search
from .source import DataSource, require_integer
from .text_files import Files, count_words, find_texts, load_text, pieces

if TYPE_CHECKING:
    from torch import Tensor

    from .tokens import Stream, TokenSet

    Text = Files | Tensor
    """Where the bytes of a split are, or these, uint8 [N]."""

UNKNOWN, END = "<unk>", "<eos>"


def open_text(
    root: str | Path | None = None,
    *,
    level: str = "bytes",
    max_vocab: int | None = None,
    tokenizer: str | Path | None = None,
    valid_percent: int | None = None,
) -> TokenSet:
    """Text files as tokens: bytes (vocabulary 256), words as `open_wikitext` makes them, or subwords (`bpe.open_bpe`).

    `root` is a folder with train, valid and test files (.txt, .tokens, .raw or .bin, plain, .gz or .xz; several train files are
    train-0.txt, train-1.txt, ...), or one file. Of one file, and of train files alone, the last `valid_percent` (10) are held
    out: whole lines. Beside a test file they are where `valid_percent` is given. Large texts are memory-mapped, and unpacked
    once into the cache (`text_files.py`).

    Raises:
        UsageError: no such files, text that is not UTF-8 where words are asked for, or `valid_percent` where a file says
            what is held out.
    """
    _check_level(level, tokenizer)
    percent = require_integer("valid_percent", 10 if valid_percent is None else valid_percent, 1, 99)
    if root is None:
        raise UsageError(
            "the data set text needs a root", hint="name a text file, or a folder with train and valid files"
        )
    path = Path(root).expanduser()
    texts: dict[str, Text] = {"train": (path,)} if path.is_file() else dict(search("text", root, [], find_texts))
    if valid_percent is not None and "valid" in texts:
        raise UsageError(
            f"{path} has a file that says what is held out, so no part of the training text can be",
            hint="leave out valid_percent (data.validation), or name the training text alone",
        )
    divided = valid_percent is not None or not texts.keys() & {"valid", "test"}
    if divided:
        texts |= _halves(_load(texts["train"], str(path)), path, percent)
    found = _by("text", path, texts, level, max_vocab, tokenizer)
    if divided:
        found.drawn_from_training = f"the last {percent} % of its training text, from the next whole line on"
    return found


def open_wikitext2(
    root: str | Path | None = None,
    *,
    level: str = "words",
    max_vocab: int | None = None,
    tokenizer: str | Path | None = None,
) -> TokenSet:
    """WikiText-2 (Merity et al. 2016): 33,278 words, 2,088,628 of them to train on.

    Options and Raises as in `open_wikitext`.
    """
    return open_wikitext("wikitext-2", root, level, max_vocab, tokenizer)


def open_wikitext103(
    root: str | Path | None = None,
    *,
    level: str = "words",
    max_vocab: int | None = None,
    tokenizer: str | Path | None = None,
) -> TokenSet:
    """WikiText-103 (Merity et al. 2016): 267,735 words, 103,227,021 of them to train on.

    Options and Raises as in `open_wikitext`.
    """
    return open_wikitext("wikitext-103", root, level, max_vocab, tokenizer)


def open_wikitext(
    name: str, root: str | Path | None, level: str, max_vocab: int | None, tokenizer: str | Path | None
) -> TokenSet:
    """A tokenised WikiText: words between spaces, and <eos> for the end of every line, also of an empty one.

    The vocabulary is that of the training split, most frequent first, and <unk> for the rest; `max_vocab` cuts it.
    So that split is read when the set is opened: 1 s for WikiText-2, 50 times that for 103; `write_tokens` keeps the result.
    Perplexity is a word's, as published: exp(loss). `level="bytes"` gives the same text as bytes, `level="bpe"` as
    subwords (`bpe.open_bpe`).

    Raises:
        UsageError: its files are not there, or damaged.
    """
    _check_level(level, tokenizer)
    texts = search(name, root, [name, f"text/{name}"], find_texts)
    folder = texts["train"][0].parent
    return _by(name, folder, texts, level, max_vocab, tokenizer)


def _check_level(level: str, tokenizer: str | Path | None) -> None:
    one_of("level", level, ("bytes", "words", "bpe"))
    if tokenizer is not None and level != "bpe":
        raise UsageError(f"a tokenizer is for level=bpe; this is level={level}", hint="leave out one of them")


def _by(
    name: str,
    source: Path,
    texts: Mapping[str, Text],
    level: str,
    max_vocab: int | None,
    tokenizer: str | Path | None,
) -> TokenSet:
    if level == "bytes":
        return _by_bytes(name, source, texts)
    if level == "words":
        return _by_words(name, source, texts, max_vocab)
    from .bpe import open_bpe

    loaded = {split: _load(text, f"{source}: the split {split}") for split, text in texts.items()}
    return open_bpe(name, source, loaded, max_vocab, tokenizer)


TEXT = DataSource(
    name="text", kind="tokens", open=open_text, summary="text files, by bytes, words or subwords", can_hold_out=True
)
WIKITEXT2 = DataSource(
    name="wikitext-2",
    kind="tokens",
    open=open_wikitext2,
    summary="WikiText-2, by words or subwords",
    splits=("train", "valid", "test"),
    data_defaults={"level": "words"},
)
WIKITEXT103 = DataSource(
    name="wikitext-103",
    kind="tokens",
    open=open_wikitext103,
    summary="WikiText-103, by words or subwords",
    splits=("train", "valid", "test"),
    data_defaults={"level": "words"},
)


def _halves(text: Tensor, path: Path, valid_percent: int) -> dict[str, Text]:
    """A text uint8 [N] in two: the last part begins with the next whole line."""
    cut = len(text) * (100 - valid_percent) // 100
    for piece in pieces(text[cut:]):
        if (end := piece.find(b"\n")) >= 0:
            cut += end + 1
            break
        cut += len(piece)
    if not 0 < cut < len(text):
        raise UsageError(
            f"{path}: too little text to hold {valid_percent} % out", hint="give a folder with train and valid files"
        )
    return {"train": text[:cut], "valid": text[cut:]}


def _load(text: Text, where: str) -> Tensor:
    """The bytes of a split, uint8 [N].

    Raises:
        UsageError: there are none.
    """
    data = load_text(text) if isinstance(text, tuple) else text
    if not len(data):
        raise UsageError(f"{where} is empty")
    return data


def byte_stream(text: Tensor) -> Stream:
    """The bytes of a text, uint8 [N], as tokens."""
    from .tokens import Stream

    def part(n: int) -> tuple[int, int]:
        return count_words(text[:n]), n - 1

    return Stream(text, words=lambda: count_words(text), bytes=lambda: len(text) - 1, part=part)


def _by_bytes(name: str, source: Path, texts: Mapping[str, Text]) -> TokenSet:
    from .tokens import TokenSet

    def read(split: str) -> Stream:
        return byte_stream(_load(texts[split], f"{source}: the split {split}"))

    return TokenSet(name, read, split_names=tuple(texts), vocab=256, source=str(source))


def _by_words(name: str, source: Path, texts: Mapping[str, Text], max_vocab: int | None) -> TokenSet:
    from .tokens import TokenSet

    if max_vocab is not None:
        require_integer("max_vocab", max_vocab, 3, 1 << 31)
    train = _lines(texts["train"], f"{source} (train)")
    counts = Counter(chain.from_iterable(map(str.split, train)))
    counts[END] += len(train)
    counts[UNKNOWN] += 0
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    if max_vocab is not None and len(ranked) > max_vocab:
        kept = [word for word in ranked if word not in (UNKNOWN, END)][: max_vocab - 2]
        ranked = [*kept, UNKNOWN, END]
    ids = {word: index for index, word in enumerate(ranked)}

    first = _word_stream(train, ids)  # now, so that the lines, far larger than the tokens, need not be kept

    def read(split: str) -> Stream:
        return first if split == "train" else _word_stream(_lines(texts[split], f"{source} ({split})"), ids)

    return TokenSet(name, read, split_names=tuple(texts), vocab=len(ranked), source=str(source), vocabulary=ranked)


def _lines(text: Text, where: str) -> list[str]:
    """The lines of a text without their ends, which is not what str.splitlines calls lines."""
    try:
        lines = _load(text, where).numpy().tobytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: no UTF-8 at byte {error.start:,}", hint="read it with level=bytes") from None
    if not lines[-1]:
        lines.pop()
    return lines


def _word_stream(lines: list[str], ids: dict[str, int]) -> Stream:
    import torch

    from .tokens import Stream

    unknown, end = ids[UNKNOWN], ids[END]
    tokens = torch.empty(sum(len(line.split()) for line in lines) + len(lines), dtype=torch.int32)
    at, pending = 0, []
    for index, line in enumerate(lines, 1):
        pending += [ids.get(word, unknown) for word in line.split()]
        pending.append(end)
        if len(pending) >= 1 << 20 or index == len(lines):  # lists of Python integers are large: a stretch at a time
            tokens[at : at + len(pending)] = torch.tensor(pending, dtype=torch.int32)
            at += len(pending)
            pending = []
    nbytes = _target_bytes(lines)
    return Stream(tokens, words=lambda: len(tokens) - 1, bytes=lambda: nbytes, part=lambda n: (n - 1, None))


def _target_bytes(lines: list[str]) -> int:
    """Bytes of the text without its first token."""
    first = lines[0].split()
    skipped = len(first[0].encode()) if first else len(lines[0].encode()) + 1
    return sum(len(line.encode()) + 1 for line in lines) - skipped
