"""Open a checkpoint of any format: its description, at the price of its header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import CheckpointError
from .bounded_json import MAX_BYTES, parse_object
from .facts import Checkpoint, Entry, Malformed, Storage, TensorInfo, looks_like_buffer, printable
from .identify import is_index, json_kind, kind_of, size_of
from .safetensors_file import read_header
from .state_dict import find_state_dict, strip_prefix
from .torch_file import read_legacy, read_zip

MAX_SHARDS = 10_000
_FORMATS = {"zip": "torch zip", "legacy": "torch legacy pickle", "safetensors": "safetensors"}


@dataclass(frozen=True, slots=True)
class _Opened:
    """One file, with the names of its tensors as they stand there."""

    path: Path
    format: str
    size: int
    tensors: Sequence[TensorInfo]
    nested_under: str | None = None
    other: tuple[Entry, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    index: dict[str, object] | None = None


def open_checkpoint(path: str | Path, *, key: str | None = None) -> Checkpoint:
    """The checkpoint at `path`: a safetensors file, a file of torch.save, or the index of a sharded checkpoint.

    Only headers are read, nothing in the file is executed, and every size is checked against the file first.
    `key` is the dotted path of the state dict where a file holds several (`ema`, `generator`); by default the
    likeliest is found.

    Raises:
        CheckpointError: it cannot be read, in one line that names the file, and mostly a hint.
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
        if size > MAX_BYTES:
            raise Malformed(f"is JSON of {size:,} bytes; an index of up to {MAX_BYTES:,} is read")
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
    """The checkpoint whose index is `parsed`: every shard is opened, and must hold what the index says."""
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
    """Tensor name -> shard name, each shard a file beside or below the index."""
    found = parsed["weight_map"]
    assert isinstance(found, dict)
    files: dict[str, str] = {}
    for tensor, name in found.items():
        if not isinstance(name, str) or not name or "\0" in name:
            raise Malformed(f"the shard of {printable(tensor)!r} is not a file name")
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise Malformed(f"the shard {printable(name)!r} lies outside the directory of the index")
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
    """`checkpoint` with its tensors: the common prefix off, ties and buffers marked."""
    if not tensors:
        raise CheckpointError(f"{printable(str(checkpoint.path))}: holds no tensors")
    prefix = strip_prefix([t.name for t in tensors])
    seen: dict[tuple[Storage, int, tuple[int, ...], tuple[int, ...]], str] = {}
    finished: list[TensorInfo] = []
    for tensor in tensors:
        name = tensor.name[len(prefix) :]
        memory = (tensor.storage, tensor.first, tensor.shape, tensor.stride)
        first = seen.setdefault(memory, name) if tensor.nbytes else name
        tied = None if first == name else first
        buffer = looks_like_buffer(name, tensor.dtype, tensor.shape)
        finished.append(replace(tensor, name=name, tied_to=tied, buffer=buffer))
    return replace(checkpoint, prefix=prefix, tensors=tuple(finished))


def _some(names: Sequence[str], n: int = 5) -> str:
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(printable(name, 120) for name in names[:n]) + more
