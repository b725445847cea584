"""Opens a checkpoint of any format by reading its header: what kind of file it is, its tensors, its shards."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from ..base.text import some_of
from ..errors import CheckpointError, did_you_mean
from .blocks import with_dense_weights
from .facts import Checkpoint, OtherEntry, TensorInfo, looks_like_buffer
from .safetensors_file import read_header
from .state_dict import find_state_dict, strip_prefix
from .torch_file import read_legacy, read_zip
from .untrusted import MAX_JSON_BYTES, Malformed, parse_object, printable

MAX_SHARDS = 10_000
_FORMATS = {"zip": "torch zip", "legacy": "torch legacy pickle", "safetensors": "safetensors"}


@dataclass(frozen=True, slots=True)
class _Opened:
    """One file, with the names of its tensors as they are in the file."""

    path: Path
    format: str
    size: int
    tensors: Sequence[TensorInfo]
    nested_under: str | None = None
    other: tuple[OtherEntry, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    index: dict[str, object] | None = None


def open_checkpoint(path: str | Path, *, key: str | None = None) -> Checkpoint:
    """The checkpoint at `path`: a safetensors file, a file of torch.save, or the index of a sharded checkpoint.

    Only headers are read, nothing in the file is executed, and every size is checked against the file first.

    Args:
        key: the dotted path of the state dict, where a file holds several (`ema`, `generator`); by default the
            likeliest one is taken.

    Raises:
        CheckpointError: it cannot be read; one line that names the file and what is wrong, mostly with a hint.
    """
    path = Path(path)
    opened = _open_file(path, key)
    if opened.index is not None:
        return _open_shards(opened, opened.index, key)
    checkpoint = Checkpoint(
        path,
        opened.format,
        (path,),
        opened.size,
        (),
        nested_under=opened.nested_under,
        other=opened.other,
        metadata=opened.metadata,
    )
    return _finished(checkpoint, opened.tensors)


def _open_file(path: Path, key: str | None) -> _Opened:
    size = size_of(path)
    try:
        with path.open("rb") as file:
            return _read(path, file, size, key)
    except Malformed as error:
        joint = " " if error.what.startswith(("is ", "holds ", "has ")) else ": "
        shown = printable(str(path))
        raise CheckpointError(f"{shown}{joint}{error.what}", hint=error.hint) from None
    except OSError as error:
        raise CheckpointError(f"{printable(str(path))}: {error.strerror}") from None


def _read(path: Path, file: BinaryIO, size: int, key: str | None) -> _Opened:
    kind = kind_of(file, size)
    if kind == "json":
        if size > MAX_JSON_BYTES:
            raise Malformed(f"is JSON of {size:,} bytes; an index of up to {MAX_JSON_BYTES:,} is read")
        file.seek(0)
        parsed = parse_object(file.read(), "it")
        if not is_index(parsed):
            raise Malformed(f"is {json_kind(parsed)}", hint="give the checkpoint itself, or its *.index.json")
        return _Opened(path, "", size, (), index=parsed)
    if kind == "safetensors":
        if key is not None:
            raise Malformed("is safetensors, which holds one flat list of tensors", hint="leave out --key")
        tensors, metadata = read_header(path)
        return _Opened(path, _FORMATS[kind], size, tensors, metadata=metadata)
    saved = (read_zip if kind == "zip" else read_legacy)(path, file, size)
    found = find_state_dict(saved.root, key)
    placed = [saved.place(name, tensor) for name, tensor in found.tensors.items()]
    return _Opened(path, _FORMATS[kind], size, placed, found.nested_under, found.other)


def _open_shards(index: _Opened, parsed: dict[str, object], key: str | None) -> Checkpoint:
    """The checkpoint of an index: every shard is opened, and must hold the tensors that the index lists for it."""
    where = printable(str(index.path))
    try:
        files = _weight_map(parsed)
    except Malformed as error:
        raise CheckpointError(f"{where}: {error.what}", hint=error.hint) from None
    names = list(dict.fromkeys(files.values()))
    missing = [name for name in names if not (index.path.parent / name).exists()]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} of its {len(names)} shards are missing: {_some(missing)}",
            hint="download them into the same directory",
        )
    shards = {name: _open_file(index.path.parent / name, key) for name in names}
    if nested := [name for name, shard in shards.items() if shard.index is not None]:
        raise CheckpointError(f"{where}: its shard {printable(nested[0])} is an index itself")
    held = {name: {t.name: t for t in shard.tensors} for name, shard in shards.items()}
    absent = [f"{tensor} (in {name})" for tensor, name in files.items() if tensor not in held[name]]
    if absent:
        raise CheckpointError(
            f"{where}: {len(absent)} tensors of the index are not in their shards: {_some(absent)}",
            hint="index and shards are of different checkpoints; inspect a shard by itself to see what it holds",
        )
    checkpoint = Checkpoint(
        index.path,
        f"{next(iter(shards.values())).format}, {len(shards)} shards",
        tuple(shard.path for shard in shards.values()),
        sum(shard.size for shard in shards.values()),
        (),
        metadata=next(iter(shards.values())).metadata,
        other=tuple(entry for shard in shards.values() for entry in shard.other),
        notes=tuple(_unnamed(files, held)),
    )
    return _finished(checkpoint, [held[name][tensor] for tensor, name in files.items()])


def _weight_map(parsed: dict[str, object]) -> dict[str, str]:
    """Tensor name -> file name of its shard, in the directory of the index or below it."""
    found = parsed["weight_map"]
    assert isinstance(found, dict)
    files: dict[str, str] = {}
    for tensor, name in found.items():
        if not isinstance(name, str) or not name or "\0" in name:
            raise Malformed(f"the shard of {printable(tensor)!r} is not a file name")
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise Malformed(f"the shard {printable(name)!r} is outside the directory of the index")
        files[tensor] = name
    if not files:
        raise Malformed("the index names no tensors")
    if len(set(files.values())) > MAX_SHARDS:
        raise Malformed(f"the index names more than {MAX_SHARDS:,} shards")
    return files


def _unnamed(files: Mapping[str, str], held: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    extra = [name for name, tensors in held.items() for tensor in tensors if tensor not in files]
    return [f"{len(extra)} tensors in the shards are not named by the index and left out"] if extra else []


def _finished(checkpoint: Checkpoint, tensors: Sequence[TensorInfo]) -> Checkpoint:
    """`checkpoint` with its tensors: without the common prefix, stored blocks as one weight, tied tensors and buffers marked."""
    if not tensors:
        raise CheckpointError(f"{printable(str(checkpoint.path))}: holds no tensors")
    prefix = strip_prefix([t.name for t in tensors])
    try:
        tensors = with_dense_weights([replace(t, name=t.name[len(prefix) :]) for t in tensors])
    except Malformed as error:
        raise CheckpointError(f"{printable(str(checkpoint.path))}: {error.what}", hint=error.hint) from None
    seen: dict[tuple[object, ...], str] = {}
    finished: list[TensorInfo] = []
    for tensor in tensors:
        memory = tuple((part.storage, part.first, part.shape, part.stride) for part in tensor.stored)
        first = seen.setdefault(memory, tensor.name) if tensor.nbytes else tensor.name
        tied = None if first == tensor.name else first
        buffer = looks_like_buffer(tensor.name, tensor.dtype, tensor.shape)
        finished.append(replace(tensor, tied_to=tied, buffer=buffer))
    return replace(checkpoint, prefix=prefix, tensors=tuple(finished))


def _some(names: Sequence[str], n: int = 5) -> str:
    return some_of((printable(name, 120) for name in names), n)


# --- what a file is, judged by its first bytes and never by its name ---

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
        raise CheckpointError(f"{shown} is a directory, not a checkpoint", hint=_in_directory(path))
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{shown} is not a regular file", hint="checkpoints are read from files on disk")
    if status.st_size == 0:
        raise CheckpointError(f"{shown} is empty (0 bytes)", hint=_AGAIN)
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
        missing = f": the {int(want[1]):,} bytes it refers to are not here" if want else ""
        raise Malformed(f"is a Git LFS pointer{missing}", hint="fetch them with `git lfs pull`")
    if _PAGE.match(head):
        raise Malformed("is an HTML or XML page, not a checkpoint", hint=f"the link led to a web page: {_AGAIN}")
    if head[8:9] == b"{" and not _is_text(head[:8]):  # 8 bytes of header length: the high ones are zero
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
    """Whether these bytes are UTF-8 text without control characters; they may end within a character."""
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
    """A hint which file of a directory was probably meant: an index before its shards, safetensors before pickles."""
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
    """Whether this JSON is the index of a sharded checkpoint."""
    return isinstance(parsed.get("weight_map"), dict)


def json_kind(parsed: dict[str, object]) -> str:
    """What a JSON file that is no index seems to be, for an error message."""
    if "architectures" in parsed or "model_type" in parsed:
        return "the configuration of a model, not its weights"
    return f"JSON, but no index of a sharded checkpoint (its keys: {printable(json.dumps(list(parsed)[:4]), 80)})"
