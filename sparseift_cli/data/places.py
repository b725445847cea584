"""Where data sets lie, how they get there, and what to say when they are not there."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import lzma
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ..base.locations import cache_dir
from ..errors import UsageError

# Files out of folders and .tar.gz archives, read into memory under a size limit: nothing is ever extracted to disk.

_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, tarfile.TarError)
_BLOCK = 1 << 20


def read_members(place: Path, names: Sequence[str], limit: int) -> dict[str, bytearray]:
    """The files called `names` in a folder, or anywhere in a .tar.gz, each of at most `limit` bytes.

    Raises:
        UsageError: one of them is missing, too large or unreadable, or the archive is damaged.
    """
    if place.is_dir():
        return {name: read_file(place / name, limit) for name in names}
    found: dict[str, bytearray] = {}
    try:
        with tarfile.open(place, "r|gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name not in names or not member.isfile():
                    continue
                file = archive.extractfile(member)
                if member.size > limit or file is None:
                    raise UsageError(f"{place}: {name} has {member.size:,} bytes; the real one has under {limit:,}")
                found[name] = bytearray(file.read())
                if len(found) == len(names):
                    return found
    except _DAMAGE as error:
        raise UsageError(f"{place}: damaged, or no .tar.gz ({error})", hint="delete it and fetch it again") from None
    except OSError as error:
        raise UsageError(f"{place}: {error.strerror or error}") from None
    missing = ", ".join(name for name in names if name not in found)
    raise UsageError(f"{place}: lacks {missing}", hint="it is another data set, or cut short")


def read_file(path: Path, limit: int) -> bytearray:
    """A file of at most `limit` bytes; of a name that ends in .gz or .xz, what it unpacks to.

    Raises:
        UsageError: it is missing, too large, unreadable or damaged.
    """
    data = bytearray()
    for block in file_blocks(path):
        data += block
        if len(data) > limit:
            raise UsageError(f"{path}: has more than {limit:,} bytes")
    return data


_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
PACKED = tuple(_OPENERS)
"""Endings of names of files that are unpacked when they are read."""


def file_blocks(path: Path) -> Iterator[bytes]:
    """What a file holds, or of a name that ends in .gz or .xz what it unpacks to, by blocks of at most 1 MB.

    Raises:
        UsageError: it is missing, unreadable or damaged.
    """
    try:
        with _OPENERS.get(path.suffix, Path.open)(path, "rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except _DAMAGE as error:
        raise UsageError(
            f"{path}: damaged, or no {path.suffix} ({error})", hint="delete it and fetch it again"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None


# What takes long while data are opened: data sets have no command line to print on, so a caller takes the lines.

_listener: ContextVar[Callable[[str], object] | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def announcing(note: Callable[[str], object] | None) -> Iterator[None]:
    """Within the block `note(text)` is called with what `announce` is given."""
    token = _listener.set(note)
    try:
        yield
    finally:
        _listener.reset(token)


def announce(text: str) -> None:
    """Say in a line what is about to take long, or is not as one would expect."""
    if (note := _listener.get()) is not None:
        note(text)


Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Remote:
    """A file that may be fetched, and nothing but that file: its checksum is known."""

    url: str
    md5: str  # what the publishers of these sets give
    nbytes: int  # at most: a server that sends more is cut off

    @property
    def file_name(self) -> str:
        return self.url.rpartition("/")[2]


def data_home() -> Path:
    """The folder of data sets: $SPARSEIFT_DATA, else ~/.cache/sparseift. It need not exist."""
    named = os.environ.get("SPARSEIFT_DATA")
    return Path(named).expanduser() if named else cache_dir()


def search(
    name: str,
    root: str | Path | None,
    layouts: Sequence[str],
    recognise: Callable[[Path], Found | None],
    *,
    remotes: Sequence[Remote] = (),
    download: bool = False,
) -> Found:
    """What `recognise` makes of the first place that holds the data set `name`.

    The places are `root` itself (None: `data_home()`) and every `layout` inside it. With `download` what is not there
    is fetched into it.

    Raises:
        UsageError: nothing is there, with every path that was tried; or it cannot be fetched.
    """
    base = data_home() if root is None else Path(root).expanduser()
    places = [base, *(base / layout for layout in layouts)]
    for place in places:
        if place.exists() and (found := recognise(place)) is not None:
            return found
    if download and remotes:
        for remote in remotes:
            fetch(remote, base)
        for place in places:
            if place.exists() and (found := recognise(place)) is not None:
                return found
    tried = ", ".join(str(place) for place in places)
    ways = ["put it into one of these places", "name another root"]
    if remotes:
        ways.append("let download=True fetch it")
    raise UsageError(f"the data set {name} is not there; tried {tried}", hint=", or ".join(ways))


def fetch(remote: Remote, folder: Path) -> Path:
    """The file in `folder`, downloaded unless it is there: it appears under its name once it is whole and its md5 right.

    Raises:
        UsageError: no network, a server that says no, another checksum, or a folder that cannot be written.
    """
    target = folder / remote.file_name
    if target.exists():
        return target
    by_hand = f"fetch it by other means and put it at {target}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{remote.file_name}.", suffix=".part", dir=folder)
    except OSError as error:
        raise UsageError(f"cannot write into {folder}: {error.strerror}", hint="name another root") from None
    try:
        with os.fdopen(handle, "wb") as file:
            _receive(remote, file.write)
        os.replace(partial, target)
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UsageError(f"cannot download {remote.url}: {reason}", hint=by_hand) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    return target


def _receive(remote: Remote, write: Callable[[bytes], object]) -> None:
    digest, received = hashlib.md5(usedforsecurity=False), 0
    with urllib.request.urlopen(remote.url, timeout=30) as answer:
        while block := answer.read(_BLOCK):
            received += len(block)
            if received > remote.nbytes:
                raise UsageError(f"{remote.url} sent more than the {remote.nbytes:,} bytes of the file")
            digest.update(block)
            write(block)
    if digest.hexdigest() != remote.md5:
        raise UsageError(
            f"{remote.url} sent a file with md5 {digest.hexdigest()}, not {remote.md5}",
            hint="the transfer was cut short or altered: try again",
        )
