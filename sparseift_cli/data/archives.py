"""Files out of folders and .tar.gz archives, read into memory under a size limit: nothing is ever extracted to disk."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..errors import UsageError

_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)


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
    """A file of at most `limit` bytes; of a name that ends in .gz, what it unpacks to.

    Raises:
        UsageError: it is missing, too large, unreadable or damaged.
    """
    opened = gzip.open if path.suffix == ".gz" else Path.open
    try:
        with opened(path, "rb") as file:
            data = bytearray(file.read(limit + 1))
    except _DAMAGE as error:
        raise UsageError(f"{path}: damaged ({error})", hint="delete it and fetch it again") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    if len(data) > limit:
        raise UsageError(f"{path}: has more than {limit:,} bytes")
    return data
