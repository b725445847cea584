"""Masks in the folders that this program writes, and their spectra: of a layer, of a run's checkpoints, of a report's groups.

Files are read a tensor at a time, so that memory has to hold one layer only. No torch. Lengths are checked, hashes are not:
what is read here is analysed, never trained on. A spectrum takes seconds a layer of a large model, so a report has spectra
only where they are asked for.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checkpoint.blocks import with_dense_weights
from ...checkpoint.facts import StoredBlocks, TensorInfo
from ...checkpoint.safetensors_file import read_header
from ...checkpoint.untrusted import Malformed, printable
from ...errors import ArtifactError
from ...runs.checkpoint import MANIFEST, TENSORS
from ...runs.directory import CHECKPOINTS
from ...transforms.artifact import MASKS, WEIGHTS
from ..read import Run
from .gaps import Spectrum, spectral, unrolled

GAPS = ("spectral_gap", "ramanujan_gap", "weighted_spectral_gap")
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("float16", "float32", "float64")}


@dataclass(frozen=True, slots=True)
class MaskedLayer:
    """A mask and its weight, both of the weight's shape: [out, in] of a linear layer, [out, in, *kernel] of a convolution."""

    name: str
    mask: NDArray[np.bool_]
    weight: NDArray[Any] | None
    """None where the element type is not read (float8)."""

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
class KeptCheckpoint:
    """A checkpoint that is still in a run directory."""

    step: int
    path: Path


def history(
    run: str | Path, *, skipped: list[str] | None = None, progress: Callable[[str], None] | None = None
) -> list[LayerSpectrum]:
    """The spectrum of every masked layer in every kept checkpoint of a run directory, by step, then in file order.

    Args:
        run: a run directory; without checkpoints, or of a dense model, the list is empty.
        skipped: gets a sentence for every checkpoint that is damaged, or that the training process deletes meanwhile.
        progress: called with the name of every layer before its spectrum is computed, which may take seconds.
    """
    rows: list[LayerSpectrum] = []
    for kept in kept_checkpoints(run):
        found: list[LayerSpectrum] = []
        try:
            for layer in checkpoint_layers(kept.path):
                if progress:
                    progress(f"{Path(run).name}, step {kept.step:,}: {printable(layer.name, 60)}")
                found.append(LayerSpectrum.of(layer, kept.step))
        except (ArtifactError, ArithmeticError) as error:  # a mean over some of its layers would mislead
            if skipped is not None:
                skipped.append(error.message if isinstance(error, ArtifactError) else f"{kept.path}: {error}")
            continue
        rows += found
    return rows


def kept_checkpoints(run: str | Path) -> list[KeptCheckpoint]:
    """The checkpoints of a run directory, oldest first; of a step that was saved again the last one."""
    folder = Path(run) / CHECKPOINTS
    found: dict[int, tuple[int, Path]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if named := _NAME.fullmatch(path.name):
            step, again = int(named[1]), int(named[2] or 0)
            found[step] = max(found.get(step, (again, path)), (again, path))
    return [KeptCheckpoint(step, path) for step, (_, path) in sorted(found.items())]


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
    tensors = tensors_in(path / TENSORS)
    yield from _layers(_under("masks/", tensors), _dense(_under("model/", tensors), path / TENSORS))


def artifact_layers(folder: str | Path) -> Iterator[MaskedLayer]:
    """The masked layers of a transformed model (`artifact`).

    Raises:
        ArtifactError: a file is missing or not of its format.
    """
    weights = Path(folder) / WEIGHTS
    yield from _layers(tensors_in(Path(folder) / MASKS), _dense(tensors_in(weights), weights))


def spectra_of_runs(
    runs: Sequence[Run], frame_rows: Sequence[Mapping[str, Any]], progress: Callable[[str], None] | None = None
) -> tuple[list[RunSpectra], list[str]]:
    """Of the runs in a group's means, of all its runs where there are none; and notes on what could not be read.

    Args:
        runs: the report's runs.
        frame_rows: the rows of `frame.runs_frame`, one for each of `runs`.
        progress: as for `history`.
    """
    counted = {row["group"] for row in frame_rows if row["counted"]}
    found: list[RunSpectra] = []
    notes: list[str] = []
    for run, row in zip(runs, frame_rows, strict=True):
        if run.recipe.get("transform") and (row["counted"] or row["group"] not in counted):
            found.append(RunSpectra(run.path, row["group"], history(run.path, skipped=notes, progress=progress)))
    found = [one for one in found if one.rows]
    if not found:
        notes.append("--spectral: no run here keeps a checkpoint with masks, so there are no spectra")
    return found, notes


def by_layer(spectra: Sequence[RunSpectra], group: str) -> Mapping[tuple[int, str], Mapping[str, Any]]:
    """(step, layer) -> the mean of every number of `Spectrum` over the group's runs; None where no run has it."""
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for one in spectra:
        for row in one.rows if one.group == group else ():
            rows.setdefault((row.step or 0, row.layer), []).append(row.spectrum.to_json())
    return {key: {name: _mean_of_known([row[name] for row in same]) for name in same[0]} for key, same in rows.items()}


def summed(spectra: Sequence[RunSpectra]) -> list[dict[str, Any]]:
    """A row a group and step: group, step, runs, layers, the mean of each of GAPS over layers and runs, and `ramanujan`.

    `ramanujan` is the share of the layers (0 to 1) whose Ramanujan gap is at least 0.
    """
    found: list[dict[str, Any]] = []
    for group in dict.fromkeys(one.group for one in spectra):
        every = [(row.step or 0, one.path, row) for one in spectra if one.group == group for row in one.rows]
        for step in sorted({step for step, _, _ in every}):
            rows = [row.spectrum.to_json() for at, _, row in every if at == step]
            gaps = [row["ramanujan_gap"] for row in rows if row["ramanujan_gap"] is not None]
            found.append(
                {
                    "group": group,
                    "step": step,
                    "runs": len({path for at, path, _ in every if at == step}),
                    "layers": len({row.layer for at, _, row in every if at == step}),
                    **{name: _mean_of_known([row[name] for row in rows]) for name in GAPS},
                    "ramanujan": sum(gap >= 0 for gap in gaps) / len(gaps) if gaps else None,
                }
            )
    return found


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def tensors_in(path: Path) -> dict[str, TensorInfo]:
    """Name -> facts, in the file's order.

    Raises:
        ArtifactError: the file is missing, cannot be read, or is not of its format.
    """
    try:
        return {info.name: info for info in read_header(path)[0]}
    except Malformed as error:
        raise ArtifactError(f"{path}: {error.what}", hint=error.hint) from None
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}", hint="the folder is incomplete") from None


def _under(prefix: str, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return {name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)}


def _dense(tensors: Mapping[str, TensorInfo], path: Path) -> dict[str, TensorInfo]:
    """The same with one weight for the tensors of each weight of stored blocks."""
    named = [replace(info, name=name) for name, info in tensors.items()]
    try:
        return {info.name: info for info in with_dense_weights(named)}
    except Malformed as error:
        raise ArtifactError(f"{path}: {error.what}", hint=error.hint) from None


def _layers(masks: Mapping[str, TensorInfo], weights: Mapping[str, TensorInfo]) -> Iterator[MaskedLayer]:
    """The masks, and of weights of stored blocks where the blocks are."""
    for name in dict.fromkeys((*masks, *(name for name, info in weights.items() if info.blocks))):
        if name in weights and (blocks := weights[name].blocks):
            yield MaskedLayer(name, mask_of_blocks(blocks), _floats_of_blocks(blocks))
            continue
        info = masks[name]
        if info.dtype != "bool" or name not in weights or weights[name].shape != info.shape:
            raise ArtifactError(
                f"{info.storage.path}: the mask of {printable(name)} fits no weight",
                hint="masks and weights are of different models",
            )
        yield MaskedLayer(name, _raw(info, np.dtype(np.uint8)) != 0, _floats(weights[name]))


def mask_of_blocks(blocks: StoredBlocks) -> NDArray[np.bool_]:
    """The mask [*shape of the weight] of a weight of stored blocks."""
    layout = blocks.layout
    stored = np.ones((layout.num_blocks, layout.taps, layout.block, layout.block), dtype=np.bool_)
    return _spread(blocks, stored)


def _floats_of_blocks(blocks: StoredBlocks) -> NDArray[Any] | None:
    values = _floats(blocks.values)
    return None if values is None else _spread(blocks, values)


def _spread(blocks: StoredBlocks, values: NDArray[Any]) -> NDArray[Any]:
    """A dense array [*shape of the weight] from `values` of the stored blocks [n, B, B] or [n, taps, B, B]."""
    layout = blocks.layout
    rows, columns = layout.grid
    dense = np.zeros((rows, columns, layout.taps, layout.block, layout.block), dtype=values.dtype)
    row = np.repeat(np.arange(rows), np.diff(np.asarray(blocks.offsets)))
    dense[row, np.asarray(blocks.columns)] = values.reshape(-1, *dense.shape[2:])
    if layout.transposed:
        return dense.transpose(1, 4, 0, 3, 2).reshape(layout.shape)
    return dense.transpose(0, 3, 1, 4, 2).reshape(layout.shape)


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
        raise ArtifactError(f"{path}: became shorter while it was read", hint="try again")
    return values.reshape(info.shape)
