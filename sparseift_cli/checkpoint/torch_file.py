"""Reads files of `torch.save`: where each tensor is. Of the contents only the pickle is read, and that as data (`inert_pickle`).

Zip format: `NAME/data.pkl` describes the object, `NAME/data/KEY` holds each storage. Legacy format (PyTorch before
1.6): five pickles in a row (magic number, protocol, system, the object, the keys of the storages), then for each key
its number of elements in 8 bytes and its data. In both, the position of every storage is known without reading its
data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from .facts import BITS, Storage, TensorInfo
from .inert_pickle import MAX_BYTES, Window, read_pickle
from .state_dict import describe
from .torch_rules import PickledTensor, TorchRules
from .untrusted import Malformed, printable

# --- the directory of a zip archive ---

# Why not Python's zipfile: it would decompress what it reads, and build a large object per member. torch.save stores
# members without compression, so only names, sizes and offsets are read here, and every size is checked against the
# file. https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT

MAX_DIRECTORY = 32 << 20
MAX_MEMBERS = 400_000
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_TRUNCATED = "truncated: a zip archive (what torch.save writes) without its directory at the end"
_AGAIN = "download or copy it again"


@dataclass(frozen=True, slots=True)
class ZipMember:
    """One file of the archive. `offset` is the position of its local header."""

    name: str
    offset: int
    size: int  # bytes, unpacked
    packed: int  # bytes in the archive
    stored: bool  # neither compressed nor encrypted


@dataclass(frozen=True, slots=True)
class Archive:
    """Members by name, and the offset of the directory, which comes after all data."""

    members: dict[str, ZipMember]
    directory: int

    def data(self, file: BinaryIO, name: str) -> tuple[int, int]:
        """Offset and length of a member's bytes. Raises Malformed when its own header disagrees with the directory."""
        member = self.members[name]
        file.seek(member.offset)
        raw = file.read(_LOCAL.size)
        if len(raw) < _LOCAL.size or raw[:4] != b"PK\x03\x04":
            raise Malformed(f"damaged: the zip member {printable(name)!r} is not where the directory says")
        *_, name_length, extra_length = _LOCAL.unpack(raw)
        begin = member.offset + _LOCAL.size + name_length + extra_length
        if begin + member.size > self.directory:
            raise Malformed(f"damaged: the zip member {printable(name)!r} runs into the directory")
        return begin, member.size


def read_archive(file: BinaryIO, size: int) -> Archive:
    """The directory of an archive of `size` bytes.

    Raises:
        Malformed: there is no directory, or it does not fit the file.
    """
    count, length, offset = _find_directory(file, size)
    if count > MAX_MEMBERS or length > MAX_DIRECTORY:
        raise Malformed(f"a zip archive that claims {count:,} members; up to {MAX_MEMBERS:,} are read")
    file.seek(offset)
    raw = file.read(length)
    members: dict[str, ZipMember] = {}
    at = 0
    for _ in range(count):
        member, at = _entry(raw, at)
        if member.name in members:
            raise Malformed(f"the zip member {printable(member.name)!r} appears twice")
        members[member.name] = member
    return Archive(members, offset)


def check_stored(archive: Archive, file_size: int) -> None:
    """Refuse what torch.save never writes: compressed, encrypted or overlapping members.

    A zip bomb is one of these: without compression and overlap the members cannot be larger than the file.
    """
    for member in archive.members.values():
        if not member.stored:
            raise Malformed(
                f"the zip member {printable(member.name)!r} is compressed or encrypted "
                f"({member.packed:,} bytes in the archive, {member.size:,} unpacked); torch.save does neither",
                hint="if it is an archive of checkpoints, unpack it first",
            )
    _check_no_overlap(archive.members.values(), archive.directory, file_size)


def _check_no_overlap(members: Iterable[ZipMember], directory: int, file_size: int) -> None:
    ordered = sorted(members, key=lambda m: m.offset)
    for member in ordered:
        if member.offset + _LOCAL.size + member.size > directory:
            raise Malformed(
                f"damaged: the zip member {printable(member.name)!r} claims {member.size:,} bytes at {member.offset:,} "
                f"of a file of {file_size:,}"
            )
    for one, other in pairwise(ordered):
        if one.offset + _LOCAL.size + one.size > other.offset:
            raise Malformed(f"the zip members {printable(one.name)!r} and {printable(other.name)!r} overlap")


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Number of entries, length and offset of the central directory."""
    tail = min(size, _END.size + 0xFFFF)  # the record ends with a comment of up to 64 KiB
    file.seek(size - tail)
    raw = file.read(tail)
    at = raw.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(raw):
        raise Malformed(_TRUNCATED, hint=_AGAIN)
    _, disk, _, _, count, length, offset, _ = _END.unpack_from(raw, at)
    end = size - tail + at
    if disk not in (0, 0xFFFF):
        raise Malformed("one part of a zip archive of several parts")
    if 0xFFFF in (count,) or 0xFFFFFFFF in (length, offset):
        count, length, offset, end = _zip64(file, end)
    if offset + length > end:
        raise Malformed("damaged: the zip directory does not fit the file", hint=_AGAIN)
    return count, length, offset


def _zip64(file: BinaryIO, end: int) -> tuple[int, int, int, int]:
    """The same from the 64-bit record; its locator is right before the 32-bit record at `end`."""
    file.seek(max(end - _LOCATOR.size, 0))
    raw = file.read(_LOCATOR.size)
    if len(raw) == _LOCATOR.size and raw[:4] == b"PK\x06\x07":
        offset = _LOCATOR.unpack(raw)[2]
        if offset + _END64.size <= end:
            file.seek(offset)
            record = file.read(_END64.size)
            if record[:4] == b"PK\x06\x06":
                *_, count, length, directory = _END64.unpack(record)
                return count, length, directory, offset
    raise Malformed("damaged: the 64-bit directory record of the zip archive is missing", hint=_AGAIN)


def _entry(raw: bytes, at: int) -> tuple[ZipMember, int]:
    """The directory entry at `at`, and where the next one begins."""
    if at + _ENTRY.size > len(raw) or raw[at : at + 4] != b"PK\x01\x02":
        raise Malformed("damaged: the zip directory breaks off", hint=_AGAIN)
    facts = _ENTRY.unpack_from(raw, at)
    _, _, _, flags, method, _, _, _, packed, size, n_name, n_extra, n_comment, _, _, _, offset = facts
    begin = at + _ENTRY.size
    end = begin + n_name + n_extra + n_comment
    if end > len(raw):
        raise Malformed("damaged: the zip directory breaks off", hint=_AGAIN)
    name = raw[begin : begin + n_name].decode("utf-8", "backslashreplace")
    wide = _wide_fields(raw[begin + n_name : begin + n_name + n_extra])
    # The 64-bit extra field holds, in this order, only those values that overflowed their 32 bits.
    values = [wide.pop(0) if value == 0xFFFFFFFF and wide else value for value in (size, packed, offset)]
    stored = method == 0 and not flags & 1 and values[0] == values[1]
    return ZipMember(name, values[2], values[0], values[1], stored), end


def _wide_fields(extra: bytes) -> list[int]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            body = extra[at + 4 : at + 4 + length]
            return [int.from_bytes(body[i : i + 8], "little") for i in range(0, len(body) - 7, 8)]
        at += 4 + length
    return []


MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
_ONLY = "only PyTorch and safetensors files are read"


@dataclass(frozen=True, slots=True)
class TorchFile:
    """The saved object, with `PickledTensor` in place of tensors, and the position of the storage of each key."""

    root: object
    storages: Mapping[str, Storage]

    def place(self, name: str, tensor: PickledTensor) -> TensorInfo:
        """The TensorInfo for `tensor`, called `name`: shape, dtype, and where its bytes are in the file."""
        storage = self.storages[tensor.storage.key]
        return TensorInfo(name, tensor.shape, tensor.dtype, storage, tensor.stride, tensor.first)


def read_zip(path: Path, file: BinaryIO, size: int) -> TorchFile:
    """A checkpoint in the zip format. Raises Malformed for any other archive, and for a damaged one."""
    archive = read_archive(file, size)
    root = _root_folder(archive)
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


def _root_folder(archive: Archive) -> str:
    """The folder in the archive that holds data.pkl, with its slash. The error says what else the archive seems to be."""
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
            hint="if you trust the file, load it yourself and save its state dict with torch.save",
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
    """The position of each storage: 8 bytes with its number of elements, then the elements."""
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
