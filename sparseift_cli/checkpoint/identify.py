"""What a file is, judged by its first bytes and never by its name; what is no checkpoint is called by its own name."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import BinaryIO, Literal

from ..errors import CheckpointError, did_you_mean
from .facts import Malformed, printable

Kind = Literal["zip", "legacy", "safetensors", "json"]
SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt", ".pkl", ".pickle", ".tar", ".index.json")
_AGAIN = "download it again"
_ONLY = "only PyTorch and safetensors files are read"

_FOREIGN: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras and TensorFlow write .h5), not a torch checkpoint", _ONLY),
    (0, b"\x93NUMPY", "a NumPy array, not a torch checkpoint", _ONLY),
    (0, b"GGUF", "a GGUF file (llama.cpp), not a torch checkpoint", _ONLY),
    (0, b"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (0, b"BZh", "compressed with bzip2", "unpack it first"),
    (0, b"\xfd7zXZ\x00", "compressed with xz", "unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (257, b"ustar", "a tar archive (PyTorch before 0.1.10 wrote these)", "save it again with a newer PyTorch"),
)
_PAGE = re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
_LFS = b"version https://git-lfs.github.com/spec/"
_PICKLE = re.compile(rb"\x80[\x02-\x05]|[(}\]]?c[\w.]+\n[\w.]+\n[(p]|L\d{10,40}L?\n")


def size_of(path: Path) -> int:
    """The size of a readable regular file in bytes.

    Raises:
        CheckpointError: there is none at `path`: nothing, a directory, a pipe, a device, or no permission.
    """
    shown = printable(str(path))
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{shown}: no such file", hint=_similar(path)) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{shown}: {reason}") from None
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{shown}: is a directory, not a checkpoint", hint=_in_directory(path))
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{shown}: is not a regular file", hint="checkpoints are read from files on disk")
    if status.st_size == 0:
        raise CheckpointError(f"{shown}: is empty (0 bytes)", hint=_AGAIN)
    return status.st_size


def kind_of(file: BinaryIO, size: int) -> Kind:
    """Which reader can read this file.

    Raises:
        Malformed: none; the message says what the file looks like instead.
    """
    file.seek(0)
    head = file.read(4096)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    for at, magic, what, hint in _FOREIGN:
        if head[at : at + len(magic)] == magic:
            raise Malformed(f"is {what}", hint=hint)
    if head.startswith(_LFS):
        want = re.search(rb"size (\d{1,18})", head)
        missing = f": the {int(want[1]):,} bytes it stands for are not here" if want else ""
        raise Malformed(f"is a Git LFS pointer{missing}", hint="fetch them with `git lfs pull`")
    if _PAGE.match(head):
        raise Malformed("is an HTML or XML page, not a checkpoint", hint=f"the link led to a web page: {_AGAIN}")
    if head[8:9] == b"{" and not _is_text(head[:8]):  # the length of a header: some of its high bytes are zero
        return "safetensors"
    if head.lstrip()[:1] == b"{" and _is_text(head):
        return "json"
    if _PICKLE.match(head):
        return "legacy"
    if _is_text(head):
        begins = printable(head.decode("utf-8", "replace"), 40)
        raise Malformed(f"is a text file, not a checkpoint (it begins {begins!r})")
    if len(head) >= 8 and int.from_bytes(head[:8], "little") > size and head[8:9] in (b"{", b""):
        raise Malformed("is truncated or not safetensors", hint=_AGAIN)
    raise Malformed(f"is of no known format (it begins {head[:8].hex(' ')})", hint=_ONLY)


def _is_text(head: bytes) -> bool:
    """Text, were it cut anywhere: UTF-8 without control characters."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) < 4096:
            return False
        text = head[: error.start].decode("utf-8")
    return not any(c < " " and c not in "\t\n\r\f" for c in text)


def _similar(path: Path) -> str | None:
    try:
        names = [entry.name for entry, _ in zip(path.parent.iterdir(), range(1000), strict=False)]
    except (OSError, ValueError):
        return None
    return did_you_mean(path.name, names)


def _in_directory(path: Path) -> str | None:
    """The file in a directory that was probably meant: an index before its shards, safetensors before pickles."""
    try:
        names = sorted(entry.name for entry, _ in zip(path.iterdir(), range(1000), strict=False))
    except OSError:
        return None
    for suffix in (".index.json", ".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt"):
        if fitting := [name for name in names if name.endswith(suffix)]:
            some = "did you mean" if len(fitting) == 1 else f"it holds {len(fitting)} {suffix} files, the first is"
            return f"{some} {printable(str(path / fitting[0]))}" + ("?" if len(fitting) == 1 else "")
    return f"give the checkpoint file itself; run directories below it: sparseift report {printable(str(path))}"


def is_index(parsed: dict[str, object]) -> bool:
    """Is this JSON the index of a sharded checkpoint?"""
    return isinstance(parsed.get("weight_map"), dict)


def json_kind(parsed: dict[str, object]) -> str:
    """What a JSON file that is no index seems to be, for the message."""
    if "architectures" in parsed or "model_type" in parsed:
        return "the configuration of a model, not its weights"
    return f"JSON, but no index of a sharded checkpoint (its keys: {printable(json.dumps(list(parsed)[:4]), 80)})"
