"""Weights of stored blocks in a checkpoint: their four tensors are listed as one dense weight.

How they are written is in `kernels.layout`. The index is small and read while the file is listed; the values are not. Every
size is checked before it is used.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import replace

from ..errors import CheckpointError, UsageError
from ..kernels.layout import PARTS, checked_layout, compact_paths, key
from .facts import StoredBlocks, TensorInfo, row_major
from .untrusted import Malformed, printable

_CODES = {"int32": "i", "int64": "q"}


def with_dense_weights(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """`tensors`, in their order, with one `weight` for the tensors of each weight of stored blocks.

    Raises:
        Malformed: they do not agree, or one is missing.
        CheckpointError: the file cannot be read.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    try:
        weights = {path: _weight(by_name, path) for path in compact_paths(by_name)}
    except UsageError as error:
        raise Malformed(printable(error.message), hint=error.hint) from None
    at_values = {key(path, PARTS[0]): weight for path, weight in weights.items()}
    hidden = {key(path, part) for path in weights for part in PARTS[1:]}
    return [at_values.get(tensor.name, tensor) for tensor in tensors if tensor.name not in hidden]


def _weight(tensors: dict[str, TensorInfo], path: str) -> TensorInfo:
    """The weight at `path`: of its dense shape, with what is stored of it in `blocks`."""
    parts = tuple(tensors[key(path, part)] for part in PARTS)
    values, offsets, columns, layout = parts
    if not values.contiguous:
        raise UsageError(f"{values.name} has a stride, and blocks are stored one behind the other")
    index = [_integers(part) for part in (offsets, columns, layout)]
    found = checked_layout(path, values.shape, *index)
    name, stride = key(path, "weight"), row_major(found.shape)
    return replace(
        values, name=name, shape=found.shape, stride=stride, blocks=StoredBlocks(found, parts, index[0], index[1])
    )


def _integers(info: TensorInfo) -> array[int]:
    """The content of a list of integers."""
    if len(info.shape) != 1 or info.dtype not in _CODES or not info.contiguous:
        raise UsageError(f"{info.name} is {info.dtype} {list(info.shape)}, not a list of int32")
    found = array(_CODES[info.dtype])
    try:
        with info.storage.path.open("rb") as file:
            file.seek(info.storage.offset + info.extent[0])
            found.frombytes(file.read(info.nbytes))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "became shorter while it was read"
        raise CheckpointError(f"{printable(str(info.storage.path))}: {reason}") from None
    if len(found) != info.numel:
        raise CheckpointError(f"{printable(str(info.storage.path))}: became shorter while it was read")
    if info.storage.big_endian != (sys.byteorder == "big"):
        found.byteswap()
    return found
