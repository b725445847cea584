"""Masks and weights as NumPy arrays, from the folders this program writes, and their spectra over a run.

Files are read a tensor at a time, so that a layer is all that memory has to hold. No torch. Lengths are checked, hashes are
not: what is read is looked at, never trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checkpoint.facts import TensorInfo
from ...checkpoint.untrusted import printable
from ...errors import ArtifactError
from ...runs.checkpoint import MANIFEST, TENSORS
from ...runs.directory import CHECKPOINTS
from ...transforms.artifact import MASKS, WEIGHTS
from ..tensors import tensors_in
from .gaps import Spectrum, spectral, unrolled

_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("float16", "float32", "float64")}


@dataclass(frozen=True, slots=True)
class MaskedLayer:
    """A mask [*shape] of booleans and the weight it lies on, None where its element type is not read (float8)."""

    name: str
    mask: NDArray[np.bool_]
    weight: NDArray[Any] | None

    def spectrum(self) -> Spectrum:
        return spectral(unrolled(self.mask), None if self.weight is None else unrolled(self.weight))


@dataclass(frozen=True, slots=True)
class LayerSpectrum:
    """One row of a table: `step` is None outside runs, `shape` is that of the weight."""

    layer: str
    shape: tuple[int, ...]
    spectrum: Spectrum
    step: int | None = None

    @staticmethod
    def of(layer: MaskedLayer, step: int | None = None) -> LayerSpectrum:
        return LayerSpectrum(layer.name, layer.mask.shape, layer.spectrum(), step)

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "layer": self.layer, "shape": list(self.shape), **self.spectrum.to_json()}


@dataclass(frozen=True, slots=True)
class RunSpectra:
    """A run's rows, by step, then in file order; none where it is dense or keeps no checkpoint."""

    path: Path
    group: str
    rows: Sequence[LayerSpectrum]


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint that a run has kept."""

    step: int
    path: Path


def history(
    run: str | Path, *, skipped: list[str] | None = None, tell: Callable[[str], None] | None = None
) -> list[LayerSpectrum]:
    """The spectrum of every masked layer in every kept checkpoint of a run directory, by step, then in file order.

    Empty for dense runs and runs without checkpoints. A checkpoint that is damaged, or that the running run deletes
    meanwhile, is left out and named in `skipped`. `tell` hears of every layer before it is looked at.
    """
    rows: list[LayerSpectrum] = []
    for kept in kept_checkpoints(run):
        found: list[LayerSpectrum] = []
        try:
            for layer in checkpoint_layers(kept.path):
                if tell:
                    tell(f"{Path(run).name}, step {kept.step:,}: {printable(layer.name, 60)}")
                found.append(LayerSpectrum.of(layer, kept.step))
        except (ArtifactError, ArithmeticError) as error:  # none of its layers, rather than half of them
            if skipped is not None:
                skipped.append(error.message if isinstance(error, ArtifactError) else f"{kept.path}: {error}")
            continue
        rows += found
    return rows


def kept_checkpoints(run: str | Path) -> list[Kept]:
    """The checkpoints of a run directory, oldest first; of a step that was saved again the last one."""
    folder = Path(run) / CHECKPOINTS
    found: dict[int, tuple[int, Path]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if named := _NAME.fullmatch(path.name):
            step, again = int(named[1]), int(named[2] or 0)
            found[step] = max(found.get(step, (again, path)), (again, path))
    return [Kept(step, path) for step, (_, path) in sorted(found.items())]


def is_checkpoint_folder(path: str | Path) -> bool:
    """Is it one checkpoint of a run (`runs.checkpoint`)?"""
    return (Path(path) / MANIFEST).is_file() and (Path(path) / TENSORS).is_file()


def checkpoint_layers(folder: str | Path) -> Iterator[MaskedLayer]:
    """The masked layers of one checkpoint of a run; none where the run is dense.

    Raises:
        ArtifactError: a file is missing, shorter than its manifest says, or not of its format.
    """
    path = Path(folder)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        wanted, size = manifest["files"][TENSORS]["bytes"], (path / TENSORS).stat().st_size
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}", hint="use another checkpoint of the run") from None
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{path / MANIFEST} is damaged", hint="use another checkpoint of the run") from None
    if size != wanted:
        raise ArtifactError(
            f"{path / TENSORS} has {size:,} bytes instead of {wanted:,}", hint="use another checkpoint of the run"
        )
    yield from _layers(_under("masks/", tensors := tensors_in(path / TENSORS)), _under("model/", tensors))


def artifact_layers(folder: str | Path) -> Iterator[MaskedLayer]:
    """The masked layers of a transformed model (`artifact`).

    Raises:
        ArtifactError: a file is missing or not of its format.
    """
    yield from _layers(tensors_in(Path(folder) / MASKS), tensors_in(Path(folder) / WEIGHTS))


def _under(prefix: str, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return {name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)}


def _layers(masks: Mapping[str, TensorInfo], weights: Mapping[str, TensorInfo]) -> Iterator[MaskedLayer]:
    for name, info in masks.items():
        if info.dtype != "bool" or name not in weights or weights[name].shape != info.shape:
            raise ArtifactError(
                f"{info.storage.path}: the mask of {printable(name)} fits no weight",
                hint="masks and weights are of different models",
            )
        yield MaskedLayer(name, _raw(info, np.dtype(np.uint8)) != 0, _floats(weights[name]))


def _floats(info: TensorInfo) -> NDArray[Any] | None:
    if info.dtype == "bfloat16":  # the upper half of a float32
        halves = _raw(info, np.dtype("<u2")).astype(np.uint32)
        return (halves << np.uint32(16)).view(np.float32)
    return _raw(info, _DTYPES[info.dtype]) if info.dtype in _DTYPES else None


def _raw(info: TensorInfo, dtype: np.dtype[Any]) -> NDArray[Any]:
    path, size = info.storage.path, info.numel
    try:
        values = np.fromfile(path, dtype, size, offset=info.storage.offset)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}", hint="was it deleted while it was read?") from None
    if values.size != size:
        raise ArtifactError(f"{path}: has become shorter while it was read", hint="try again")
    return values.reshape(info.shape)
