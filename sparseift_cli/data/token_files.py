"""Tokens made elsewhere, memory-mapped: a folder with tokens.json and one .bin of little-endian integers per split.

{"format": "sparseift.tokens/1", "dtype": "uint16", "vocab": 50257,
 "splits": {"train": {"file": "train.bin", "tokens": 9036044, "words": null, "bytes": null}, "valid": {...}}}

`dtype` is uint8, uint16 or uint32. `words` and `bytes` count the text behind the tokens (all but the first), for
perplexity per word and bits per byte; they may be missing. Nothing but what is used is read from a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.untrusted import Malformed, parse_object
from ..errors import UsageError, one_of
from .places import read_file, search
from .source import DataSource, require_integer

if TYPE_CHECKING:
    from torch import Tensor

    from .tokens import Stream, TokenSet

FORMAT = "sparseift.tokens/1"
HEADER = "tokens.json"
_HELD_AS = {"uint8": "uint8", "uint16": "int16", "uint32": "int32"}
"""The torch type of the same size: torch indexes by signed types everywhere, so the bits of large ids are read as negative."""
_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4}


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """A split of token files, as the header has it."""

    file: str
    tokens: int
    words: int | None
    bytes: int | None


def open_tokens(root: str | Path | None = None) -> TokenSet:
    """The token files in the folder `root`, checked against their header.

    Raises:
        UsageError: no header, one that says something else than this format, or files of another size.
    """
    import torch

    from .tokens import Stream, TokenSet

    path = search("tokens", root, ["tokens"], lambda place: found if (found := place / HEADER).is_file() else None)
    try:
        header = parse_object(bytes(read_file(path, 1 << 20)), "it")
    except Malformed as error:
        raise UsageError(f"{path}: {error.what}") from None
    if header.get("format") != FORMAT or not isinstance(splits := header.get("splits"), dict) or not splits:
        raise UsageError(f"{path}: no header of token files", hint=f'it needs "format": "{FORMAT}" and "splits"')
    dtype = str(header.get("dtype"))
    try:
        one_of("dtype", dtype, list(_HELD_AS))
        vocab = require_integer("vocab", header.get("vocab"), 1, 1 << (8 * _BYTES[dtype]))
        counts = {name: _checked(path.parent, name, entry, _BYTES[dtype]) for name, entry in splits.items()}
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from None
    if sys.byteorder != "little":
        raise UsageError(f"{path}: token files are read on little-endian machines only")

    def read(split: str) -> Stream:
        found = counts[split]
        # A private mapping: nothing is written, whatever is done to the tensor.
        file, held_as = str(path.parent / found.file), getattr(torch, _HELD_AS[dtype])
        mapped = torch.from_file(file, shared=False, size=found.tokens, dtype=held_as)
        return Stream(mapped, words=lambda: found.words, bytes=lambda: found.bytes)

    return TokenSet("tokens", read, split_names=tuple(counts), vocab=vocab, source=str(path.parent))


TOKENS = DataSource(
    name="tokens",
    kind="tokens",
    open=open_tokens,
    summary="token files made elsewhere, memory-mapped",
    can_hold_out=True,
)


def _checked(folder: Path, split: str, entry: object, width: int) -> SplitCounts:
    name = entry.get("file") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(name, str) or Path(name).name != name:
        raise UsageError(f"the split {split} names no file beside the header")
    tokens = require_integer(f"tokens of {split}", entry.get("tokens"), 1, 1 << 50)
    path = folder / name
    if not path.is_file() or path.stat().st_size != tokens * width:
        size = f"has {path.stat().st_size:,} bytes" if path.is_file() else "is not there"
        raise UsageError(f"{path} {size}; {tokens:,} tokens need {tokens * width:,}")
    words, nbytes = (
        None if entry.get(key) is None else require_integer(f"{key} of {split}", entry[key], 1, 1 << 60)
        for key in ("words", "bytes")
    )
    return SplitCounts(name, tokens, words, nbytes)


def write_tokens(folder: str | Path, splits: Mapping[str, Tensor | Stream], *, vocab: int) -> None:
    """Token files in `folder` of integer tensors [N], or of streams of another set: the smallest type that holds `vocab`.

    The header is written last. It is how a corpus that takes long to tokenise is prepared once.

    Raises:
        UsageError: tokens outside 0..vocab-1.
    """
    import torch

    from .dataset import raw_bytes
    from .tokens import BITS, Stream

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_type(vocab)
    counts: dict[str, SplitCounts] = {}
    for name, given in splits.items():
        stream = given if isinstance(given, Stream) else Stream(given)
        ids = stream.tokens.to(torch.int64) & BITS[stream.tokens.dtype]
        high = int(ids.max())
        if high >= vocab:  # negative ones too, read as unsigned
            raise UsageError(f"{name}: a token {high} is outside a vocabulary of {vocab}")
        data = ids.to(getattr(torch, _HELD_AS[dtype]))
        (folder / f"{name}.bin").write_bytes(raw_bytes(data))
        counts[name] = SplitCounts(f"{name}.bin", len(data), stream.words(), stream.bytes())
    write_header(folder, dtype, vocab, counts)


def token_type(vocab: int) -> str:
    """The smallest type of token files that holds the ids of a vocabulary."""
    return next(name for name, width in _BYTES.items() if vocab <= 1 << (8 * width))


def write_header(folder: Path, dtype: str, vocab: int, counts: Mapping[str, SplitCounts]) -> None:
    """The header of token files, which are then a data set."""
    splits = {name: asdict(entry) for name, entry in counts.items()}
    header = {"format": FORMAT, "dtype": dtype, "vocab": vocab, "splits": splits}
    (folder / HEADER).write_text(json.dumps(header, indent=1) + "\n", "utf-8")
