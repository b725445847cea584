"""`sparseift inspect --spectral`: how well the masks of a transformed model, a run or a checkpoint connect its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.sheets import Column, Sheet, integer, ratio
from ..checkpoint.facts import Checkpoint, TensorInfo
from ..checkpoint.untrusted import printable
from ..errors import SparseiftError, UsageError
from ..transforms.artifact import is_artifact, open_artifact
from .options import Format
from .output import render
from .progress import Spinner

if TYPE_CHECKING:
    from ..report.spectral.history import LayerSpectrum, MaskedLayer

SCHEMA = "sparseift.spectral/1"
LEAST_ZEROS = 0.01  # of a weight without a mask: fewer zeros are a padding row or chance, not a mask
NOTES = (
    "rows are outputs, columns inputs x taps (of weights stored inputs first the reverse); s1, s2: largest singular values",
    "Ramanujan gap: sqrt(dl - 1) + sqrt(dr - 1) - s2 with the mean degrees of rows and columns; at least 0 is well connected",
    "by s1: 2 sqrt(s1 - 1) - s2; iterative mean: of the gaps of columns of equal degree; weighted: s1 - s2 of |weights|",
)


def inspect_spectral(
    source: str, *, is_file: bool, every: bool, key: str | None, fmt: Format, output: Path | None
) -> None:
    """Print one row per masked layer of `source`.

    Args:
        source: a run directory, one of its checkpoints, a transformed model's folder, or a checkpoint file.
        is_file: `source` is a checkpoint file and not the name of a model, where it is not such a folder.
        every: of a run directory all kept checkpoints, not the newest only.
        key: of a checkpoint file, the dotted path of the state dict in it.
        fmt: how the rows are printed.
        output: the file to write them to, in place of stdout.

    Raises:
        UsageError: `source` is none of these, or nothing in it is sparse.
        ArtifactError: a folder written by this program cannot be read.
        CheckpointError: a file cannot be read.
    """
    kind, title, layers, notes = _opened(source, is_file, every, key)
    rows = _rows(layers)
    if not rows:
        raise UsageError(
            f"nothing in {printable(source)} is sparse",
            hint="--spectral reads masks, or weights with at least 1 % zeros",
        )
    payload = {
        "schema": SCHEMA,
        "kind": kind,
        "source": source,
        "layers": [row.to_json() for row in rows],
        "notes": notes,
    }
    sheet = Sheet(title, _columns(rows, fmt), [_shown(row) for row in rows], [*NOTES, *notes])
    render([sheet], payload, fmt, output)


_Layers = Iterator[tuple[int | None, "MaskedLayer"]]


def _opened(source: str, is_file: bool, every: bool, key: str | None) -> tuple[str, str, _Layers, list[str]]:
    """The kind of `source`, a title, its layers with their steps, and notes, which are complete once the layers are read."""
    from ..report.spectral.history import artifact_layers, checkpoint_layers, is_checkpoint_folder, kept_checkpoints
    from ..runs.directory import RECIPE

    path, shown = Path(source), printable(source)
    if (path / RECIPE).is_file():  # checked first: a run directory has the plan of an artifact too
        _no_key(key, source)
        kept = kept_checkpoints(path)
        if not kept:
            raise UsageError(f"{shown} has no checkpoint yet", hint="wait for the run's first one")
        chosen = kept if every else kept[-1:]
        steps = f"{len(chosen)} checkpoints" if len(chosen) > 1 else f"step {chosen[0].step:,}"
        layers = ((k.step, layer) for k in chosen for layer in checkpoint_layers(k.path))
        older = len(kept) - len(chosen)
        notes = (
            [f"{older} older {'checkpoint' if older == 1 else 'checkpoints'} too: --every-checkpoint"] if older else []
        )
        return "run", f"{shown}: masks at {steps}", layers, notes
    if every:
        raise UsageError(
            f"{shown} is not a run directory; only those keep several checkpoints",
            hint="give a folder of runs/<recipe>/",
        )
    if is_artifact(path):
        _no_key(key, source)
        if not open_artifact(path).weights.is_file():
            raise UsageError(
                f"{shown} holds a plan without weights (--plan-only)", hint="transform the model without --plan-only"
            )
        return "artifact", f"{shown}: masks of the transformed model", _at(None, artifact_layers(path)), []
    folder = path.parent if path.is_file() else path
    if is_checkpoint_folder(folder):
        _no_key(key, source)
        step = int(folder.name.removeprefix("step-").partition(".")[0]) if folder.name.startswith("step-") else None
        return "run", f"{shown}: masks of the checkpoint", _at(step, checkpoint_layers(folder)), []
    if path.is_dir() or not is_file:
        what = "not a transformed model, run or checkpoint" if path.is_dir() else "a model, which has no masks yet"
        raise UsageError(
            f"{shown} is {what}",
            hint="give a folder of sparseift transform, a run directory "
            "runs/<recipe>/<run>, one of its checkpoints, or a checkpoint file",
        )
    return _foreign(source, key)


def _foreign(source: str, key: str | None) -> tuple[str, str, _Layers, list[str]]:
    from ..checkpoint.opening import open_checkpoint

    checkpoint = open_checkpoint(source, key=key)
    notes: list[str] = []
    title = f"{printable(str(checkpoint.path))}: zeros of the weights as masks"
    return "checkpoint", title, _at(None, _foreign_layers(checkpoint, notes)), notes


def _foreign_layers(checkpoint: Checkpoint, notes: list[str]) -> Iterator[MaskedLayer]:
    """The masks of torch.nn.utils.prune if there are any, else the zeros of every weight that has LEAST_ZEROS of them."""
    from ..checkpoint.reading import read_tensor
    from ..report.spectral.history import MaskedLayer, mask_of_blocks

    by_name = {t.name: t for t in checkpoint.tensors}
    left_out = 0
    for info in checkpoint.tensors:
        if not _is_weight(info):
            continue
        weight = read_tensor(checkpoint, info.name).float().numpy()
        mask_name = info.name.removesuffix("_orig") + "_mask"
        masked = info.name.endswith("_orig") and mask_name in by_name and by_name[mask_name].shape == info.shape
        if info.blocks:
            mask = mask_of_blocks(info.blocks)
        else:
            mask = read_tensor(checkpoint, mask_name).numpy(force=True) != 0 if masked else weight != 0
        if masked or info.blocks or 1 - mask.mean() >= LEAST_ZEROS:
            yield MaskedLayer(info.name.removesuffix("_orig") if masked else info.name, mask, weight)
        else:
            left_out += 1
    if left_out:
        have = "weight has" if left_out == 1 else "weights have"
        notes.append(f"{left_out} other {have} fewer than 1 % zeros")


def _is_weight(info: TensorInfo) -> bool:
    """A parameter that is a matrix or a kernel, whose values can be read."""
    from ..checkpoint.facts import is_integer, is_readable

    usable = len(info.shape) > 1 and info.numel > 0 and is_readable(info.dtype) and not is_integer(info.dtype)
    complex_ = info.dtype.startswith("complex")
    return usable and not complex_ and not info.buffer and info.tied_to is None and not info.name.endswith("_mask")


def _at(step: int | None, layers: Iterator[MaskedLayer]) -> _Layers:
    return ((step, layer) for layer in layers)


def _no_key(key: str | None, source: str) -> None:
    if key is not None:
        raise UsageError(f"--key is for checkpoint files, {printable(source)} is a folder", hint="leave it out")


def _rows(layers: _Layers) -> list[LayerSpectrum]:
    """The spectra. Large layers take seconds, so the name of the current one is shown on a terminal's stderr."""
    from ..report.spectral.history import LayerSpectrum

    rows: list[LayerSpectrum] = []
    with closing(Spinner()) as spinner:
        for step, layer in layers:
            spinner.show(f"{len(rows) + 1}: {printable(layer.name, 60)}")
            try:
                rows.append(LayerSpectrum.of(layer, step))
            except ArithmeticError as error:
                raise SparseiftError(f"{printable(layer.name)}: {error}", hint="please report it") from None
    return rows


def _shown(row: LayerSpectrum) -> dict[str, Any]:
    return {**row.to_json(), "layer": printable(row.layer), "shape": "x".join(map(str, row.shape))}


def _columns(rows: Sequence[LayerSpectrum], fmt: Format) -> list[Column]:
    """The columns; except in CSV, those that are empty in every row are left out."""

    def number(key: str, header: str, priority: int = 0) -> Column:
        return Column(key, header, lambda v: f"{v:,.4f}", right=True, priority=priority)

    def rare(key: str, header: str) -> Column:
        return Column(key, header, lambda n: integer(n) if n else "", right=True, priority=6)

    columns = [
        Column("step", "step", integer, right=True),
        Column("layer", "layer"),
        Column("shape", "shape", right=True, priority=5),
        Column("nnz", "non-zeros", integer, right=True, priority=4),
        Column("density", "density", ratio, right=True, priority=2),
        number("s1", "s1", 3),
        number("s2", "s2", 3),
        number("spectral_gap", "spectral gap"),
        number("ramanujan_gap", "Ramanujan gap"),
        number("ramanujan_gap_s1", "by s1", 7),
        number("ramanujan_gap_imdb", "iterative mean", 1),
        number("weighted_spectral_gap", "weighted gap"),
        Column("components", "parts", lambda n: integer(n) if n != 1 else "", right=True, priority=6),
        rare("empty_rows", "empty rows"),
        rare("empty_columns", "empty columns"),
    ]
    if fmt is Format.csv:
        return columns
    shown = [_shown(row) for row in rows]
    return [c for c in columns if any(_has_text(c, row) for row in shown)]


def _has_text(column: Column, row: Mapping[str, Any]) -> bool:
    return row.get(column.key) is not None and bool(column.show(row[column.key]))
