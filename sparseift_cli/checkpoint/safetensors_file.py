"""The header of a `.safetensors` file, in plain Python: the data behind it is never touched.

Layout: 8 bytes n (little-endian), n bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end]}}`, then the data.
As in the reference implementation the tensors must tile the data exactly: no holes, no overlaps, nothing behind.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import BinaryIO

from .bounded_json import MAX_BYTES, parse_object
from .dtypes import BITS, SAFETENSORS
from .facts import LARGEST, Malformed, Storage, TensorInfo, printable, row_major

MAX_DIMS = 64


def read_header(path: Path, file: BinaryIO, size: int) -> tuple[list[TensorInfo], dict[str, str]]:
    """Tensors in the order of their data, and the `__metadata__`, of an open file of `size` bytes.

    Raises:
        Malformed: the header or the file's size breaks the format.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise Malformed(
            f"truncated or not safetensors: its header claims {length:,} bytes, the file has {size:,}",
            hint="download or copy it again",
        )
    if length > MAX_BYTES:
        raise Malformed(f"its safetensors header claims {length:,} bytes; up to {MAX_BYTES:,} are read")
    header = parse_object(file.read(length), "the safetensors header")
    metadata = _metadata(header.pop("__metadata__", {}))
    tensors = [_tensor(path, 8 + length, size, name, facts) for name, facts in header.items()]
    tensors.sort(key=lambda t: (t.storage.offset, t.nbytes))
    _check_tiling(tensors, 8 + length, size)
    return tensors, metadata


def _metadata(found: object) -> dict[str, str]:
    if not isinstance(found, dict):
        raise Malformed("`__metadata__` of the safetensors header is not an object")
    if not all(isinstance(value, str) for value in found.values()):
        raise Malformed("`__metadata__` of the safetensors header holds something other than text")
    return found


def _tensor(path: Path, data: int, size: int, name: str, facts: object) -> TensorInfo:
    """One entry of the header; `data` is the offset of the data in a file of `size` bytes."""
    shown = printable(name)
    if not isinstance(facts, dict) or not {"dtype", "shape", "data_offsets"} <= facts.keys():
        raise Malformed(f"tensor {shown!r}: the header lacks its dtype, shape or data_offsets")
    code, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(code, str) or code not in SAFETENSORS:
        raise Malformed(f"tensor {shown!r}: unknown dtype {_shown(code)}")
    if not _sizes(shape) or len(shape) > MAX_DIMS or prod(shape) > LARGEST // 16:
        raise Malformed(f"tensor {shown!r}: impossible shape {_shown(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Malformed(f"tensor {shown!r}: impossible data_offsets {_shown(offsets)}")
    dtype = SAFETENSORS[code]
    bits, nbytes = prod(shape) * BITS[dtype], offsets[1] - offsets[0]
    if data + offsets[1] > size:
        raise Malformed(
            f"truncated: tensor {shown!r} ends at byte {data + offsets[1]:,}, the file has {size:,}",
            hint="download or copy it again",
        )
    if bits != nbytes * 8:
        raise Malformed(f"tensor {shown!r}: shape {shape} of {dtype} needs {(bits + 7) // 8:,} bytes, not {nbytes:,}")
    dims = tuple(shape)
    return TensorInfo(name, dims, dtype, Storage(path, data + offsets[0], nbytes), row_major(dims))


def _sizes(found: object) -> bool:
    """Is it a list of non-negative 64-bit integers? (True is an int in Python, and no size.)"""
    return isinstance(found, list) and all(type(n) is int and 0 <= n <= LARGEST for n in found)


def _shown(value: object) -> str:
    """A value of the header for a message; of anything nested only its type, for printing it could overflow the stack."""
    if isinstance(value, list) and all(isinstance(n, int | float) for n in value[:9]):
        return f"[{', '.join(printable(str(n), 24) for n in value[:8])}{', …' if len(value) > 8 else ''}]"
    return repr(printable(value, 40)) if isinstance(value, str) else f"of type {type(value).__name__}"


def _check_tiling(tensors: Iterable[TensorInfo], data: int, size: int) -> None:
    end, last = data, None
    for tensor in tensors:
        if tensor.storage.offset < end:
            raise Malformed(f"tensors {printable(last or '')!r} and {printable(tensor.name)!r} overlap")
        if tensor.storage.offset > end:
            hole = tensor.storage.offset - end
            raise Malformed(f"{hole:,} bytes before {printable(tensor.name)!r} belong to no tensor")
        end, last = end + tensor.nbytes, tensor.name
    if end != size:
        raise Malformed(f"{size - end:,} bytes behind the last tensor belong to no tensor")
