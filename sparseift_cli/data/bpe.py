"""Text as ids of a subword vocabulary, by the package tokenizers: a byte-level BPE of the training text, or a tokenizer.json.

The ids are written once into `cache_dir()/tokens`, as token files (`token_files.py`) that are memory-mapped: a folder there is a
data set by itself, `data: {name: tokens, root: FOLDER}`, with its tokenizer.json beside it. Its name is a hash of all that the
ids depend on: the text, the vocabulary and the version of the package.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.atomic import as_json, replace_folder, temporary_folder
from ..base.locations import cache_dir
from ..errors import UsageError
from .places import announce
from .source import require_integer
from .text_files import count_words, pieces
from .token_files import HEADER, SplitCounts, open_tokens, token_type, write_header

if TYPE_CHECKING:
    from torch import Tensor

    from .tokens import TokenSet

VOCAB = 50_257
"""The size of a vocabulary that is trained where nothing else is said: that of GPT-2."""
_FORMAT = 1  # of the ids in the cache: another number makes them again
_MADE_FROM = "made_from.json"
_VOCABULARY = "tokenizer.json"
_BATCH = 32  # pieces that are tokenised at once
_PIECE = 1 << 18
_LARGEST_PIECE = 1 << 24
_BEFORE_SPACE = re.compile(rb"\S(?=\s)")


def open_bpe(
    name: str, source: Path, texts: Mapping[str, Tensor], max_vocab: int | None, tokenizer: str | Path | None
) -> TokenSet:
    """Texts, uint8 [N] each by split, as ids.

    Args:
        source: where they are, for messages.
        max_vocab: ids of a vocabulary that is trained on the split train, at most; None: `VOCAB`.
        tokenizer: a tokenizer.json to be used instead.

    Raises:
        UsageError: the package tokenizers is missing, the file is none of its files, or the cache cannot be written.
    """
    from .dataset import raw_bytes

    library = _library()
    size = require_integer("max_vocab", VOCAB if max_vocab is None else max_vocab, 256, 1 << 31)
    given: bytes | None = None
    if tokenizer is not None:
        if max_vocab is not None:
            raise UsageError(
                "max_vocab is for a vocabulary that is trained; the tokenizer has its own", hint="leave out one"
            )
        given = _read(Path(tokenizer).expanduser())
        _parse(library, given, str(tokenizer))
    settings: dict[str, Any] = {
        "format": _FORMAT,
        "tokenizers": library.__version__,
        "vocabulary": f"BPE of {size}" if given is None else hashlib.sha256(given).hexdigest(),
        "splits": {split: hashlib.sha256(raw_bytes(text)).hexdigest() for split, text in texts.items()},
    }
    folder = cache_dir() / "tokens" / hashlib.sha256(as_json(settings)).hexdigest()[:32]
    _fill(folder, settings, library, texts, size, given)
    found = open_tokens(folder)
    found.name, found.source, found.trained_vocabulary = name, str(source), given is None
    return found


def _library() -> Any:
    try:
        return import_module("tokenizers")
    except ImportError:
        raise UsageError(
            "level=bpe needs the package tokenizers, which is not installed", hint="pip install tokenizers"
        ) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror or error}", hint="data.tokenizer is the tokenizer.json of the vocabulary"
        ) from None


def _parse(library: Any, content: bytes, where: str) -> Any:
    try:
        return library.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the package raises Exception itself
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{where}: no tokenizer.json that tokenizers {library.__version__} reads: {reason}",
            hint="it is the file that `Tokenizer.save` writes",
        ) from None


def _fill(
    folder: Path, settings: Mapping[str, Any], library: Any, texts: Mapping[str, Tensor], size: int, given: bytes | None
) -> None:
    """Make the token files `folder` of `texts` where they are not there yet, or are not what was written."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if _is_whole(folder):
                return
            nbytes = sum(map(len, texts.values()))
            which = f"a byte-level BPE vocabulary of {size:,}" if given is None else "the vocabulary"
            announce(f"writing the ids that {which} gives for {nbytes:,} bytes of text into {folder}, once")
            with temporary_folder(folder) as new:
                tokenizer = _trained(library, texts["train"], size) if given is None else _parse(library, given, "it")
                (new / _VOCABULARY).write_text(tokenizer.to_str(), "utf-8")
                _write(new, tokenizer, texts)
                hashes = {path.name: _sha256(path) for path in sorted(new.iterdir())}
                (new / _MADE_FROM).write_bytes(as_json({**settings, "sha256": hashes}))
                new.chmod(0o755)
                replace_folder(folder, new)
    except OSError as error:
        raise UsageError(
            f"cannot write into {folder.parent}: {error.strerror or error}",
            hint="is there room, and may you write there?",
        ) from None


def _is_whole(folder: Path) -> bool:
    """Whether every file has the SHA-256 that was recorded when it was written."""
    try:
        hashes = json.loads((folder / _MADE_FROM).read_bytes())["sha256"]
        return HEADER in hashes and all(_sha256(folder / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- vocabularies, and ids ---


def _trained(library: Any, text: Tensor, size: int) -> Any:
    """A byte-level BPE, as GPT-2 has it, of a text uint8 [N]: 256 bytes, then pairs by their number of occurrences.

    No special tokens. The same text gives the same vocabulary.
    """
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator((_decoded(piece)[0] for piece in whole_pieces(text)), trainer)
    return tokenizer


def _write(folder: Path, tokenizer: Any, texts: Mapping[str, Tensor]) -> None:
    """Token files of `texts`, uint8 [N] each, with what they count."""
    vocab = max(tokenizer.get_vocab().values()) + 1
    dtype = token_type(vocab)
    counts: dict[str, SplitCounts] = {}
    for split, text in texts.items():
        tokens = unreadable = 0
        first = 0  # bytes of the first token, which is never predicted
        with (folder / f"{split}.bin").open("wb") as file:
            strings = whole_pieces(text)
            while batch := [_decoded(piece) for piece in islice(strings, _BATCH)]:
                unreadable += sum(count for _, count in batch)
                if not tokens:
                    first = _first_token(tokenizer, batch[0][0], split)
                for ids in _ids(tokenizer, [string for string, _ in batch], dtype):
                    file.write(ids)
                    tokens += len(ids)
        if not tokens:
            raise UsageError(f"the vocabulary gives no ids for the split {split}")
        if unreadable:
            announce(f"warning: {unreadable:,} times the split {split} is no UTF-8; it is read as U+FFFD there")
        counts[split] = SplitCounts(f"{split}.bin", tokens, count_words(text), len(text) - first)
    write_header(folder, dtype, vocab, counts)


def _ids(tokenizer: Any, strings: list[str], dtype: str) -> Iterator[Any]:
    """The ids of every string, an array [N] each."""
    import numpy as np

    for encoding in tokenizer.encode_batch_fast(strings, add_special_tokens=False):
        yield np.asarray(encoding.ids, dtype=f"<{np.dtype(dtype).str[1:]}")


def _first_token(tokenizer: Any, string: str, split: str) -> int:
    """Bytes of the first token; and a warning where ids do not hold the whole text."""
    encoding = tokenizer.encode(string, add_special_tokens=False)
    if tokenizer.decode(encoding.ids, skip_special_tokens=False).strip() != string.strip():
        announce(
            f"warning: the vocabulary does not give the text of the split {split} back as it was, so its bits per byte and "
            "perplexity per word cannot be compared with others"
        )
    return len(string[: encoding.offsets[0][1]].encode()) if encoding.ids else 0


def _decoded(piece: bytes) -> tuple[str, int]:
    """A piece of text, and how often it is no UTF-8: U+FFFD is read there."""
    try:
        return piece.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = piece.decode("utf-8", "replace")
        return text, text.count("\ufffd") - piece.count("\ufffd".encode())


def whole_pieces(text: Tensor) -> Iterator[bytes]:
    """A text uint8 [N] in pieces of about 256 KB that end where a word ends.

    A space belongs to the word after it, so byte-level BPE gives the ids of the whole text.
    """
    rest = b""
    for piece in pieces(text, _PIECE):
        rest += piece
        ends = [match.end() for match in _BEFORE_SPACE.finditer(rest, max(0, len(rest) - 4096))]
        if ends or len(rest) >= _LARGEST_PIECE:
            cut = ends[-1] if ends else _last_character(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _last_character(data: bytes) -> int:
    """Where the last character of UTF-8 begins."""
    return next((at for at in range(len(data) - 1, len(data) - 5, -1) if data[at] & 0xC0 != 0x80), len(data))
