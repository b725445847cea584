"""The files of a text: which are there, and their bytes, in memory or memory-mapped.

A split is one file (`train.txt`, `train.bin.xz`) or several that are numbered and read one after the other (`train-0.bin.xz`,
`train-1.bin.xz`). What is large and compressed, or in several files, is unpacked once into `cache_dir()/texts`, under a name that
is a hash of the files: a text of any size costs no memory of the process, and the next run begins at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.atomic import as_json, replace_file
from ..base.locations import cache_dir
from ..errors import UsageError
from .places import PACKED, announce, file_blocks
from .token_files import HEADER

if TYPE_CHECKING:
    from torch import Tensor

Files = tuple[Path, ...]
"""The files of one split, in the order in which they are read."""

_NAMES = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}
_SUFFIXES = tuple(f"{kind}{packed}" for kind in (".txt", ".tokens", ".raw", ".bin") for packed in ("", *PACKED))
_PART = re.compile(rf"-(\d{{1,9}})({'|'.join(map(re.escape, _SUFFIXES))})")

HELD = 1 << 25
"""Bytes of files up to which a text is read into memory instead."""
_HELD_PACKED = 1 << 23  # the same of compressed files,
_UNPACKS_TO = 1 << 28  # as long as they unpack to no more than this


def find_texts(folder: Path) -> dict[str, Files] | None:
    """The files of the splits in a folder; None unless there is something to train on.

    Raises:
        UsageError: one of several numbered files is not there.
    """
    suffixes = [s for s in _SUFFIXES if not (s.startswith(".bin") and (folder / HEADER).is_file())]  # token ids
    found: dict[str, Files] = {}
    for split, names in _NAMES.items():
        for name in chain(names, (f"wiki.{n}" for n in names)):
            if split not in found and (files := _called(folder, name, suffixes)):
                found[split] = files
    return found if "train" in found else None


def _called(folder: Path, name: str, suffixes: Sequence[str]) -> Files:
    """The file `name`.txt, or `name`-0.txt, `name`-1.txt, ...; of one name with several endings the first of `suffixes`."""
    for suffix in suffixes:
        if (path := folder / (name + suffix)).is_file():
            return (path,)
    parts: dict[int, tuple[int, Path]] = {}
    for path in sorted(folder.glob(f"{name}-*")):
        match = _PART.fullmatch(path.name[len(name) :])
        if match and match[2] in suffixes and path.is_file():
            number, rank = int(match[1]), suffixes.index(match[2])
            parts[number] = min(parts.get(number, (rank, path)), (rank, path))
    numbers = sorted(parts)
    if numbers and (missing := set(range(min(1, numbers[0]), numbers[-1] + 1)) - set(numbers)):
        raise UsageError(
            f"{folder}: a file {name}-{min(missing)} is missing before {parts[numbers[-1]][1].name}",
            hint="the files of one text are numbered from 0 or 1 on, without gaps",
        )
    return tuple(parts[number][1] for number in numbers)


# --- their bytes ---


def load_text(files: Files) -> Tensor:
    """What the files hold, one after the other: uint8 [N], memory-mapped where it is large.

    Raises:
        UsageError: a file that is missing or damaged, or a cache that cannot be written.
    """
    packed = any(path.suffix in PACKED for path in files)
    try:
        size = sum(path.stat().st_size for path in files)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror or error}") from None
    if size <= (_HELD_PACKED if packed else HELD):
        data = bytearray()
        for block in chain.from_iterable(map(file_blocks, files)):
            data += block
            if len(data) > _UNPACKS_TO:
                break
        else:
            return as_tensor(data)
    return map_file(_unpacked(files) if packed or len(files) != 1 else files[0])


def as_tensor(data: bytearray) -> Tensor:
    """The bytes themselves, not a copy: uint8 [N]."""
    import torch

    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def map_file(path: Path) -> Tensor:
    """A file memory-mapped: uint8 [N]. What is written into the tensor stays out of the file."""
    import torch

    size = path.stat().st_size
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) if size else as_tensor(bytearray())


def pieces(text: Tensor, size: int = 1 << 20) -> Iterator[bytes]:
    """The bytes of a text, uint8 [N], `size` at a time."""
    for part in text.split(size):
        yield part.numpy().tobytes()


def count_words(text: Tensor) -> int:
    """Words as WikiText counts them in a text, uint8 [N]: what is between spaces, and one for every end of line."""
    words, within = 0, False  # within: the piece before ended in the middle of a word
    for piece in pieces(text):
        words += len(piece.split()) + piece.count(b"\n") - (within and not piece[:1].isspace())
        within = not piece[-1:].isspace()
    return words


# --- the cache ---


def _unpacked(files: Files) -> Path:
    """One file with what `files` unpack to, one after the other, made where it is not in the cache yet."""
    from filelock import FileLock

    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.suffix if path.suffix in PACKED else ''} ".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    folder = cache_dir() / "texts"
    target = folder / f"{digest.hexdigest()[:32]}.bin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not _is_whole(target):
                announce(f"unpacking {_listed(files)} into {target}, once")
                _unpack(files, target)
    except OSError as error:
        raise UsageError(
            f"cannot write {_listed(files)} into {folder}: {error.strerror or error}",
            hint="make room there, or unpack the files yourself (gzip -dk, xz -dk) and name the folder that has them",
        ) from None
    return target


def _listed(files: Files) -> str:
    names = [path.name for path in files]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)} files)"


def _is_whole(target: Path) -> bool:
    """Whether a cached file has the size and the SHA-256 that were recorded when it was written."""
    try:
        recorded = json.loads(target.with_suffix(".json").read_bytes())
        if target.stat().st_size != recorded["bytes"]:
            return False
        with target.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == recorded["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _unpack(files: Files, target: Path) -> None:
    """Write `target`. Where an earlier try was stopped, the files that it had finished are not unpacked again."""
    part, progress = target.with_suffix(".part"), target.with_suffix(".part.json")
    digest, done = _finished(part, progress)
    try:
        with part.open("r+b" if done else "wb") as out:
            out.seek(done[-1]["bytes"] if done else 0)
            out.truncate()
            for path in files[len(done) :]:
                for block in file_blocks(path):
                    out.write(block)
                    digest.update(block)
                out.flush()
                os.fsync(out.fileno())
                done.append({"bytes": out.tell(), "sha256": digest.hexdigest()})
                replace_file(progress, json.dumps(done).encode(), durable=True)
    except BaseException:
        with contextlib.suppress(OSError):  # half a file is of no use, and may be what filled the disk
            os.truncate(part, done[-1]["bytes"]) if done else part.unlink()
        raise
    replace_file(
        target.with_suffix(".json"), as_json({**done[-1], "files": [path.name for path in files]}), durable=True
    )
    os.replace(part, target)
    progress.unlink()


def _finished(part: Path, progress: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The hash of what an earlier try has written, and for each file that it finished the bytes and the hash up to there."""
    digest = hashlib.sha256()
    try:
        done = json.loads(progress.read_bytes())
        with part.open("rb") as file:
            for entry in done:
                while block := file.read(min(1 << 20, entry["bytes"] - file.tell())):
                    digest.update(block)
                if digest.hexdigest() != entry["sha256"]:
                    return hashlib.sha256(), []
        return digest, done
    except (OSError, ValueError, TypeError, KeyError):
        return hashlib.sha256(), []
