"""Scan the values of a checkpoint: zeros, NaN, inf and the pattern of the zeros, tensor by tensor in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .facts import Checkpoint, TensorInfo
from .patterns import Pattern, PatternFinder
from .reading import TensorReader, Unreadable, as_matrix

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TensorValues:
    """What a scan of one tensor found. `zeros` are exact (-0.0 too). `pattern`: matrices and convolutions only.

    Rows are the first dimension (output channels of a conv), columns all others (its input channels x taps).
    Where `unread` says why the values were not read, the counts are None.
    """

    name: str
    numel: int
    zeros: int | None = None
    nans: int | None = None
    infs: int | None = None
    pattern: Pattern | None = None
    unread: str | None = None

    @property
    def density(self) -> float | None:
        """Share of the elements that are not zero."""
        return None if self.zeros is None or not self.numel else (self.numel - self.zeros) / self.numel

    @property
    def label(self) -> str:
        """The pattern of the zeros in a few words; empty for a dense tensor."""
        if self.unread:
            return self.unread
        if not self.zeros:
            return ""
        if self.pattern:
            return self.pattern.label(self.zeros, self.numel)
        return "all zero" if self.zeros == self.numel else ""


def scan(checkpoint: Checkpoint) -> Iterator[TensorValues]:
    """The values of every tensor, in the order of `checkpoint.tensors`; a tied tensor is read once.

    Raises:
        CheckpointError: a file has become shorter, or unreadable, since it was opened.
    """
    done: dict[str, TensorValues] = {}
    with TensorReader() as reader:
        for info in checkpoint.tensors:
            if info.tied_to is not None:
                yield replace(done[info.tied_to], name=info.name)
                continue
            done[info.name] = scan_tensor(reader, info)
            yield done[info.name]


def scan_tensor(reader: TensorReader, info: TensorInfo) -> TensorValues:
    """The values of one tensor."""
    matrix = as_matrix(info)
    finder = PatternFinder(matrix) if len(info.shape) > 1 and PatternFinder.fits(matrix) else None
    zeros = nans = infs = 0
    try:
        for tile in reader.tiles(matrix):
            values = comparable(tile.values)
            found = int(values.count_nonzero())
            zeros += values.numel() - found
            if not all_finite(values):
                nans += int(values.isnan().count_nonzero())
                infs += int(values.isinf().count_nonzero())
            if finder:
                finder.add(replace(tile, values=values), found)
    except Unreadable as reason:
        return TensorValues(info.name, info.numel, unread=str(reason))
    return TensorValues(info.name, info.numel, zeros, nans, infs, finder.pattern() if finder else None)


def all_finite(values: torch.Tensor) -> bool:
    """No NaN and no inf? Minimum and maximum carry both, at a fraction of the price of looking for each."""
    if not values.is_floating_point() and not values.is_complex():
        return True
    import torch

    low, high = torch.aminmax(torch.view_as_real(values) if values.is_complex() else values)
    return bool(low.isfinite() and high.isfinite())


def comparable(values: torch.Tensor) -> torch.Tensor:
    """The same values in a type that torch compares on a CPU: 8-bit floats and wide unsigned integers it does not."""
    import torch

    if values.is_floating_point() and values.dtype.itemsize == 1:
        return values.to(torch.float32)
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
    return values.view(signed[values.dtype]) if values.dtype in signed else values
