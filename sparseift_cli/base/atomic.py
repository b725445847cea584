"""Files and folders that exist completely or not at all: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ArtifactError


@contextmanager
def explain_os_errors(what: str, path: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error for people: `cannot write runs/x: No space left on device`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(
            f"cannot {what} {path}: {reason}", hint="is there space, and may you write there?"
        ) from error


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk: a rename is not, before that."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes, *, durable: bool) -> None:
    """Put `content` at `path` in one step: a reader sees the old file or the new one, never half of it.

    A link stays a link, and what is no file (/dev/null, a named pipe) is written to. `durable`: wait until all of it is on
    disk, so that a power cut leaves the old file or the new one too.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():  # replaced, /dev/null would be gone for every program
        path.write_bytes(content)
        return
    target = Path(os.path.realpath(path))
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        mask = os.umask(0)  # there is no way to read it alone
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        sync_folder(target.parent)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, on the same disk, for files that are renamed to it together once they are written.

    It is deleted if the block raises. Only its owner may read it until its mode is changed.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def replace_folder(target: Path, new: Path) -> None:
    """Rename the folder `new` to `target`. An existing one is moved aside first, and moved back if the rename fails.

    Raises:
        OSError: it cannot be renamed.
    """
    if not target.exists():
        os.replace(new, target)
        return
    aside = new.with_name(f"{new.name}.old")
    os.replace(target, aside)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """`replace_file`, durable, for the files of a run.

    Raises:
        ArtifactError: it cannot be written.
    """
    with explain_os_errors("write", path):
        replace_file(path, content, durable=True)


def write_json(path: Path, payload: Mapping[str, Any]) -> None:
    """`write_file` of JSON. A float comes back from it as the same float, bit by bit."""
    write_file(path, as_json(payload))


def as_json(payload: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file of ours."""
    return (json.dumps(payload, indent=1) + "\n").encode()


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", hint="the run directory is not complete") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", hint="the run directory is damaged") from None
