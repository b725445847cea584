"""The tensors of a `.safetensors` file, listed from its header by the safetensors library; no tensor is read.

Layout of the file: 8 bytes n (little-endian), n bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end]}}`,
then the data. The library checks that the tensors cover the data exactly: no gaps, no overlaps, nothing behind the last
one, and every shape needs as many bytes as its offsets say. It does not say where in the file a tensor is; that follows
from its answers: in the order of their data, each tensor begins where the one before it ends.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from .facts import Storage, TensorInfo, row_major
from .untrusted import MAX_JSON_BYTES, Malformed, printable

MAX_DIMS = 64  # as in PyTorch
_DAMAGED = "download or copy it again"

# https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs, enum Dtype
SAFETENSORS = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "F4": "float4_e2m1fn",
}

# What safetensors says of a broken file -> what we say. Anything else is passed on as it is.
_IN_WORDS = {
    "incomplete metadata": "truncated, or with bytes that belong to no tensor: its header does not describe all of the file",
    "invalid offset for tensor": "damaged: two of its tensors overlap, or bytes between them belong to no tensor",
    "invalid shape, data type, or offset": "damaged: the shape of a tensor does not fit the bytes that it claims",
    "overflow": "damaged: the shape of a tensor is impossible",
}


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Tensors in the order of their data, and the `__metadata__`. Imports no torch.

    Raises:
        Malformed: the header or the file's size breaks the format.
        OSError: the file cannot be read.
    """
    length = _header_length(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
            listed = [(name, str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices]
    except SafetensorError as error:
        raise _malformed(str(error)) from None
    tensors: list[TensorInfo] = []
    begin = 8 + length
    for name, code, shape in listed:
        tensors.append(_tensor(path, begin, name, code, shape))
        begin += tensors[-1].nbytes
    return tensors, metadata


def _header_length(path: Path) -> int:
    """Bytes of the JSON header, refused where it is longer than the file or than any list of tensors needs.

    The library accepts headers of 100 MB, and a Python object for each tensor of one takes several times its size.
    """
    with path.open("rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise Malformed(
            f"truncated or not safetensors: its header claims {length:,} bytes, the file has {size:,}", hint=_DAMAGED
        )
    if length > MAX_JSON_BYTES:
        raise Malformed(f"its safetensors header claims {length:,} bytes; up to {MAX_JSON_BYTES:,} are read")
    return length


def _malformed(error: str) -> Malformed:
    what = error.removeprefix("Error while deserializing header: ")
    for begins, words in _IN_WORDS.items():
        if what.startswith(begins):
            return Malformed(words, hint=_DAMAGED)
    return Malformed(f"its safetensors header cannot be read: {printable(what, 160)}", hint=_DAMAGED)


def _tensor(path: Path, begin: int, name: str, code: str, shape: tuple[int, ...]) -> TensorInfo:
    """One tensor whose data begins at byte `begin` of the file; `code` is the format's name of its element type."""
    if code not in SAFETENSORS:
        raise Malformed(f"tensor {printable(name)!r}: unknown dtype {printable(code, 40)!r}")
    if len(shape) > MAX_DIMS:
        raise Malformed(f"tensor {printable(name)!r} has {len(shape):,} dimensions; up to {MAX_DIMS} are read")
    info = TensorInfo(name, shape, SAFETENSORS[code], Storage(path, begin, 0), row_major(shape))
    return replace(info, storage=Storage(path, begin, info.nbytes))
