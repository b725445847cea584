"""What a checkpoint holds, before any of its values are read. Plain data: no torch, no open files."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

from ..errors import CheckpointError, did_you_mean
from ..kernels.layout import BlockLayout
from .untrusted import printable

LARGEST = 2**63 - 1  # no size in any format goes beyond a signed 64-bit integer
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "position_ids", "inv_freq", "masked_bias")

# Bits per element. The 4- and 6-bit types exist in safetensors only, packed; they are listed but not read.
BITS = {
    "bool": 8,
    "uint8": 8,
    "int8": 8,
    "uint16": 16,
    "int16": 16,
    "uint32": 32,
    "int32": 32,
    "uint64": 64,
    "int64": 64,
    "float16": 16,
    "bfloat16": 16,
    "float32": 32,
    "float64": 64,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "float8_e4m3fnuz": 8,
    "float8_e5m2fnuz": 8,
    "float8_e8m0fnu": 8,
    "complex32": 32,
    "complex64": 64,
    "complex128": 128,
    "qint8": 8,
    "quint8": 8,
    "qint32": 32,
    "float6_e2m3fn": 6,
    "float6_e3m2fn": 6,
    "float4_e2m1fn": 4,
}


@dataclass(frozen=True, slots=True)
class Storage:
    """Consecutive bytes in a file. Tensors with the same storage share memory when PyTorch loads them."""

    path: Path
    offset: int  # of its first byte in the file
    nbytes: int
    big_endian: bool = False


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """What is stored of a weight in blocks: `parts` are its values, row offsets, columns and layout as the file has them."""

    layout: BlockLayout
    parts: tuple[TensorInfo, ...]
    offsets: array[int]
    columns: array[int]

    @property
    def values(self) -> TensorInfo:
        """The tensor [n, B, B], or [n, taps, B, B], with the stored blocks."""
        return self.parts[0]

    @property
    def density(self) -> float:
        """Share of the weight's elements that are stored."""
        return self.layout.nnz / self.layout.numel

    def __str__(self) -> str:
        rows, columns = self.layout.grid
        return f"{self.layout.num_blocks:,} of {rows * columns:,} blocks {self.layout.pattern}"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the file describes it.

    `stride` and `first` (the storage offset) count elements, as in PyTorch. `tied_to` names an earlier tensor with the
    same memory. `buffer`: not a parameter, by its name and element type (a state dict does not tell them apart). `blocks`: what
    is stored of a weight in blocks, of which shape and stride are those of the dense weight.

    >>> from pathlib import Path
    >>> weight = TensorInfo("fc.weight", (4, 3), "float16", Storage(Path("a.pt"), 64, 24), stride=(3, 1))
    >>> weight.numel, weight.nbytes, weight.contiguous, weight.extent
    (12, 24, True, (0, 24))
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    storage: Storage
    stride: tuple[int, ...]
    first: int = 0
    tied_to: str | None = None
    buffer: bool = False
    blocks: StoredBlocks | None = field(default=None, compare=False)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors of the file: itself, or the parts of a weight of stored blocks."""
        return self.blocks.parts if self.blocks else (self,)

    @property
    def parameters(self) -> int:
        """Trained elements that are stored: 0 of a buffer, and of a tied tensor, which is counted under its first name."""
        if self.buffer or self.tied_to is not None:
            return 0
        return self.blocks.layout.nnz if self.blocks else self.numel

    @property
    def nbytes(self) -> int:
        if self.blocks:
            return sum(part.nbytes for part in self.blocks.parts)
        return (self.numel * BITS[self.dtype] + 7) // 8

    @property
    def contiguous(self) -> bool:
        return self.numel == 0 or all(
            size == 1 or a == b for size, a, b in zip(self.shape, self.stride, row_major(self.shape), strict=True)
        )

    @property
    def extent(self) -> tuple[int, int]:
        """First byte and the byte after the last one, from the start of the storage."""
        begin = self.first * BITS[self.dtype] // 8
        if self.numel == 0:
            return begin, begin
        last = self.first + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return begin, ((last + 1) * BITS[self.dtype] + 7) // 8


@dataclass(frozen=True, slots=True)
class OtherEntry:
    """Something in the file that is no tensor of the state dict: its path, its type, and its value if that is short."""

    path: str
    type: str
    value: str | int | float | bool | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Names of tensors are without `prefix`, which all of them begin with in the file."""

    path: Path
    format: str
    files: tuple[Path, ...]
    file_bytes: int
    tensors: tuple[TensorInfo, ...]
    nested_under: str | None = None
    prefix: str = ""
    other: tuple[OtherEntry, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def _by_name(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.tensors}

    def __getitem__(self, name: str) -> TensorInfo:
        """The tensor of that name. Raises CheckpointError when there is none."""
        try:
            return self._by_name[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: no tensor named {printable(name)!r}", hint=did_you_mean(name, self._by_name)
            ) from None

    @property
    def parameters(self) -> int:
        """Stored elements of the parameters: buffers left out, tied tensors counted once."""
        return sum(t.parameters for t in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes that the tensors occupy, each byte counted once however many tensors share it."""
        return sum(
            end - begin for begin, end in _merged((p.storage, *p.extent) for t in self.tensors for p in t.stored)
        )

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors have each element type, the most common first."""
        return dict(Counter(t.dtype for t in self.tensors).most_common())


def row_major(shape: Iterable[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor: (2, 3, 4) -> (12, 4, 1)."""
    strides: list[int] = []
    step = 1
    for size in reversed(tuple(shape)):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def looks_like_buffer(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a buffer and not a trained parameter, by the names and types that libraries use.

    Buffers are BatchNorm statistics, position ids, rotary frequencies, integers, and the causal mask that GPT-2
    checkpoints store as a 1 x 1 x n x n `attn.bias`.
    """
    if is_integer(dtype) or name.rpartition(".")[2] in BUFFERS:
        return True
    return name.endswith("attn.bias") and len(shape) == 4 and shape[:2] == (1, 1)


def _merged(spans: Iterable[tuple[Storage, int, int]]) -> Iterable[tuple[int, int]]:
    """The union of byte spans, per storage, as disjoint spans."""
    held: tuple[Storage, int, int] | None = None
    for storage, begin, end in sorted(spans, key=lambda s: (str(s[0].path), s[0].offset, s[0].nbytes, s[1], s[2])):
        if held and held[0] == storage and begin <= held[2]:
            held = (storage, held[1], max(held[2], end))
            continue
        if held:
            yield held[1:]
        held = (storage, begin, end)
    if held:
        yield held[1:]


def is_integer(dtype: str) -> bool:
    """Whether a dtype is a boolean or plain integer: counters, masks and indices, never trained weights."""
    return dtype == "bool" or dtype.startswith(("int", "uint"))


def is_readable(dtype: str) -> bool:
    """Whether elements are whole bytes that torch can compare with zero; quantised integers have a zero point of their own."""
    return BITS[dtype] >= 8 and not dtype.startswith(("q", "complex32"))
