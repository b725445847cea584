"""What `torch.save` wrote: the zip format, and the legacy format of PyTorch before 1.6. Nothing but the pickle is read.

Zip: `NAME/data.pkl` describes the object, `NAME/data/KEY` holds each storage. Legacy: five pickles in a row (magic
number, protocol, system, the object, the keys of the storages), then for each key its number of elements in 8 bytes
and its data. So even there the place of every storage is known without reading one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .dtypes import BITS
from .facts import Malformed, Storage, TensorInfo, printable
from .inert_pickle import MAX_BYTES, Window, read_pickle
from .state_dict import describe
from .torch_rules import PickledTensor, TorchRules
from .zip_archive import Archive, check_stored, read_archive

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
_ONLY = "only PyTorch and safetensors files are read"


@dataclass(frozen=True, slots=True)
class TorchFile:
    """The saved object, with `PickledTensor` where tensors were, and where the storage of each key lies."""

    root: object
    storages: Mapping[str, Storage]

    def place(self, name: str, tensor: PickledTensor) -> TensorInfo:
        """`tensor` under `name`, with its place in the file."""
        storage = self.storages[tensor.storage.key]
        return TensorInfo(name, tensor.shape, tensor.dtype, storage, tensor.stride, tensor.first)


def read_zip(path: Path, file: BinaryIO, size: int) -> TorchFile:
    """A checkpoint in the zip format. Raises Malformed for any other archive, and for a damaged one."""
    archive = read_archive(file, size)
    root = _root(archive)
    check_stored(archive, size)
    begin, length = archive.data(file, f"{root}data.pkl")
    if length > MAX_BYTES:
        raise Malformed(f"its data.pkl has {length:,} bytes; up to {MAX_BYTES:,} are read")
    rules = TorchRules()
    file.seek(begin)
    saved = read_pickle(Window(file, length), rules)
    big = _byteorder(archive, file, root) == b"big"
    return TorchFile(saved, {key: _zip_storage(path, file, archive, root, key, rules, big) for key in rules.storages})


def _zip_storage(
    path: Path, file: BinaryIO, archive: Archive, root: str, key: str, rules: TorchRules, big: bool
) -> Storage:
    name, claimed = f"{root}data/{key}", rules.storages[key].nbytes
    if name not in archive.members:
        raise Malformed(f"the archive lacks {printable(name)!r}, which its pickle refers to")
    begin, length = archive.data(file, name)
    if length != claimed:
        raise Malformed(f"{printable(name)!r} has {length:,} bytes; its pickle says {claimed:,}")
    return Storage(path, begin, length, big)


def _byteorder(archive: Archive, file: BinaryIO, root: str) -> bytes:
    """Little-endian unless the archive says otherwise (PyTorch before 2.1 wrote no such member)."""
    if f"{root}byteorder" not in archive.members:
        return b"little"
    begin, length = archive.data(file, f"{root}byteorder")
    file.seek(begin)
    if (order := file.read(min(length, 8))) not in (b"little", b"big"):
        raise Malformed(f"unknown byte order {printable(order.decode('latin-1'))!r}")
    return order


def _root(archive: Archive) -> str:
    """The folder in the archive that holds data.pkl, with its slash. Names what else a zip archive may be."""
    names = archive.members.keys()
    files = [name for name in names if not name.endswith("/")]
    if files and all(name.endswith(".npy") for name in files):
        raise Malformed("a NumPy .npz archive, not a torch checkpoint", hint=_ONLY)
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names) or "model.json" in names:
        raise Malformed(
            "a TorchScript archive: a program with its weights, not a state dict",
            hint="save torch.jit.load(FILE).state_dict() with torch.save, and inspect that",
        )
    if "model.weights.h5" in names:
        raise Malformed("a Keras model, not a torch checkpoint", hint=_ONLY)
    if any(name.endswith(("archive_format", "extern_modules")) for name in names):
        raise Malformed("a torch.export or torch.package archive: a program with its weights, not a state dict")
    roots = [name.removesuffix("data.pkl") for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        some = ", ".join(printable(name, 40) for name in files[:3])
        raise Malformed(
            f"a zip archive without a torch checkpoint in it ({some or 'it is empty'})",
            hint="if it is an archive of checkpoints, unpack it first",
        )
    return roots[0]


def read_legacy(path: Path, file: BinaryIO, size: int) -> TorchFile:
    """A checkpoint in the legacy format. Raises Malformed for any other pickle, and for a damaged one."""
    file.seek(0)
    rules = TorchRules()
    window = Window(file, min(size, MAX_BYTES))
    first = read_pickle(window, rules)
    if first != MAGIC_NUMBER:
        raise Malformed(
            f"a plain Python pickle (it holds: {describe(first).type}), not a file of torch.save",
            hint="where you trust it, load it yourself and save its state dict with torch.save",
        )
    if (version := read_pickle(window, rules)) != PROTOCOL_VERSION:
        shown = version if isinstance(version, int) and version < 1 << 32 else describe(version).type
        raise Malformed(f"unknown version of the legacy format: {shown}")
    read_pickle(window, rules)  # the sizes of C types on the machine that wrote it; data is always little-endian
    saved = read_pickle(window, rules)
    keys = read_pickle(window, rules)
    if not isinstance(keys, list) or not all(isinstance(k, str | int) for k in keys) or len(set(keys)) != len(keys):
        raise Malformed("the list of its storages is damaged")
    return TorchFile(saved, _legacy_storages(path, file, size, [str(key) for key in keys], rules))


def _legacy_storages(path: Path, file: BinaryIO, size: int, keys: list[str], rules: TorchRules) -> dict[str, Storage]:
    """Where each storage lies: 8 bytes with its number of elements, then the elements."""
    if missing := rules.storages.keys() - set(keys):
        raise Malformed(f"it lacks the storage {printable(min(missing))!r}, which its pickle refers to")
    found: dict[str, Storage] = {}
    at = file.tell()
    for key in keys:
        file.seek(at)
        raw = file.read(8)
        if key not in rules.storages:
            raise Malformed(f"its storage {printable(key)!r} belongs to nothing in its pickle")
        pickled = rules.storages[key]
        numel = int.from_bytes(raw, "little", signed=True)
        if len(raw) == 8 and numel != pickled.numel:
            raise Malformed(f"its storage {printable(key)!r} has {numel:,} elements; its pickle says {pickled.numel:,}")
        nbytes = pickled.numel * BITS[pickled.dtype] // 8
        if at + 8 + nbytes > size:
            raise Malformed(
                f"truncated: its storage {printable(key)!r} ends at byte {at + 8 + nbytes:,}, the file has {size:,}",
                hint="download or copy it again",
            )
        found[key] = Storage(path, at + 8, nbytes)
        at += 8 + nbytes
    return found
