"""`sparseift inspect` of a checkpoint: its tensors, totals, what else is in the file, and which zoo model it fits.

`inspect_checkpoint` opens the file, then makes rows (one a tensor), totals, notes for a reader and a JSON document.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.sheets import Column, Sheet, integer, ratio
from ..base.text import shape_text, some_of
from ..checkpoint.facts import Checkpoint, OtherEntry, StoredBlocks, TensorInfo
from ..checkpoint.opening import open_checkpoint
from ..checkpoint.recognise import Match, Shapes, closest, load_catalogue, recognise
from ..checkpoint.untrusted import printable
from ..checkpoint.values import Pattern, TensorValues, scan
from ..errors import UsageError, did_you_mean
from .options import Format
from .output import render

if TYPE_CHECKING:
    from ..transforms.artifact import Artifact

SCHEMA = "sparseift.inspect/1"
SORTS = {"name": False, "parameters": True, "bytes": True, "zeros": True, "density": False}  # True: largest first
SHOWN = 12  # names in a note before "and N more"


def inspect_checkpoint(
    source: str,
    *,
    values: bool,
    key: str | None,
    model: str | None,
    depth: int | None,
    sort: str | None,
    fmt: Format,
    output: Path | None,
    transformed: Artifact | None = None,
) -> None:
    """Print the checkpoint at `source`; for a `transformed` model, what it was made from instead of which model it fits.

    Raises:
        CheckpointError: it cannot be read.
        UsageError: no such sort order or model.
    """
    _check_sort(sort, values)
    catalogue = _catalogue(model)
    checkpoint = open_checkpoint(source, key=key)
    shapes = {t.name: t.shape for t in checkpoint.tensors}
    matches = [] if transformed and model is None else recognise(shapes, catalogue)
    near = None if matches else closest(shapes, catalogue)
    scanned = _scan(checkpoint) if values else None
    rows = _sorted(_folded(_rows(checkpoint, scanned), depth), sort)
    totals = _totals(checkpoint, scanned)
    columns = _columns(values, depth)
    sheet = Sheet(
        f"{printable(str(checkpoint.path))}: {checkpoint.format}",
        columns if fmt is Format.csv else _with_something(columns, rows),
        rows,
        [
            *_notes(checkpoint, totals),
            *_value_notes(totals, scanned),
            *(_origin(transformed) if transformed else _match_notes(matches, near, model, bool(catalogue))),
        ],
    )
    render([sheet], _payload(checkpoint, totals, scanned, matches, near), fmt, output)


def _check_sort(sort: str | None, values: bool) -> None:
    if sort is not None and sort not in SORTS:
        raise UsageError(f"cannot sort a checkpoint by {sort!r}", hint=f"one of {', '.join(SORTS)}")
    if sort in ("zeros", "density") and not values:
        raise UsageError(f"--sort {sort} needs the values", hint="add --values")


def _catalogue(model: str | None) -> Mapping[str, Shapes]:
    """The zoo models to compare with: all, or the one that was asked for."""
    catalogue = load_catalogue()
    if model is None:
        return catalogue
    wanted = model.lower().replace("-", "_")
    if wanted not in catalogue:
        raise UsageError(f"no model named {model!r} to compare with", hint=did_you_mean(wanted, catalogue))
    return {wanted: catalogue[wanted]}


def _origin(transformed: Artifact) -> Iterable[str]:
    spec = transformed.spec
    from ..plan.members import MEMBERS

    member = MEMBERS.get(spec.member).title.lower()
    yield f"{member} of {printable(transformed.table.model)} at sparsity {spec.sparsity}, match {spec.match}"
    yield f"`sparseift flops {transformed.path}` shows what every layer costs"


def _scan(checkpoint: Checkpoint) -> list[TensorValues]:
    """All values, with a progress bar on a terminal's stderr."""
    if not sys.stderr.isatty():
        return list(scan(checkpoint))
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("scanning", total=sum(t.nbytes for t in checkpoint.tensors))
        found: list[TensorValues] = []
        for tensor, result in zip(checkpoint.tensors, scan(checkpoint), strict=True):
            found.append(result)
            progress.advance(task, tensor.nbytes)
        return found


def _rows(checkpoint: Checkpoint, scanned: Sequence[TensorValues] | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, tensor in enumerate(checkpoint.tensors):
        row = {
            "tensor": printable(tensor.name),
            "shape": shape_text(tensor.shape),
            "dtype": tensor.dtype,
            "elements": tensor.numel,
            "parameters": tensor.parameters,
            "bytes": tensor.nbytes,
            "note": _remark(tensor),
            "tied": tensor.tied_to is not None,
        }
        if scanned:
            found = scanned[i]
            pattern = found.pattern
            row |= {
                "zeros": found.zeros,
                "density": found.density,
                "nans": found.nans,
                "infs": found.infs,
                "empty_rows": pattern.empty_rows if pattern else None,
                "empty_columns": pattern.empty_columns if pattern else None,
                "pattern": found.label,
            }
        rows.append(row)
    return rows


def _remark(tensor: TensorInfo) -> str:
    if tensor.tied_to is not None:
        return f"tied to {printable(tensor.tied_to)}"
    if tensor.blocks:
        return f"{tensor.blocks}, density {ratio(tensor.blocks.density)}"
    return "buffer" if tensor.buffer else ""


def _folded(rows: list[dict[str, Any]], depth: int | None) -> list[dict[str, Any]]:
    """Rows added up by the first `depth` parts of their names; a tied tensor is not added again."""
    if depth is None:
        return rows
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(".".join(row["tensor"].split(".")[:depth]), []).append(row)
    return [_sum(name, group) for name, group in groups.items()]


def _sum(name: str, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [row for row in group if not row["tied"]]
    folded: dict[str, Any] = {
        "tensor": name,
        "tensors": len(group),
        "dtype": ", ".join(dict.fromkeys(row["dtype"] for row in group)),
    }
    for key in ("elements", "parameters", "bytes", "zeros", "nans", "infs"):
        counts = [row[key] for row in own if row.get(key) is not None]
        folded[key] = sum(counts) if counts else None
    read = sum(row["elements"] for row in own if row.get("zeros") is not None)
    folded["density"] = (read - folded["zeros"]) / read if read else None
    return folded


def _sorted(rows: list[dict[str, Any]], sort: str | None) -> list[dict[str, Any]]:
    if sort is None:
        return rows
    if sort == "name":
        return sorted(rows, key=lambda row: row["tensor"])
    known = [row for row in rows if row[sort] is not None]
    return sorted(known, key=lambda row: row[sort], reverse=SORTS[sort]) + [row for row in rows if row[sort] is None]


def _columns(values: bool, depth: int | None) -> list[Column]:
    """All columns; counts that are mostly 0 show a 0 as blank."""

    def rare(key: str, header: str, priority: int) -> Column:
        return Column(key, header, lambda n: integer(n) if n else "", right=True, priority=priority)

    columns = [Column("tensor", "tensor")]
    if depth is None:
        columns.append(Column("shape", "shape", right=True))
    else:
        columns.append(Column("tensors", "tensors", integer, right=True, priority=3))
    columns += [
        Column("dtype", "dtype", priority=4),
        rare("parameters", "parameters", 2),
        Column("bytes", "bytes", integer, right=True, priority=6),
    ]
    if values:
        columns += [
            Column("zeros", "zeros", integer, right=True, priority=3),
            Column("density", "density", ratio, right=True),
            rare("nans", "NaN", 1),
            rare("infs", "inf", 1),
        ]
    if depth is not None:
        return columns
    if values:
        columns += [
            rare("empty_rows", "empty rows", 7),
            rare("empty_columns", "empty columns", 7),
            Column("pattern", "zeros form", priority=1),
        ]
    return [*columns, Column("note", "note", priority=5)]


def _with_something(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Without the columns in which every cell would be blank."""
    return [c for c in columns if any((v := row.get(c.key)) is not None and c.show(v) for row in rows)]


def _totals(checkpoint: Checkpoint, scanned: Sequence[TensorValues] | None) -> dict[str, Any]:
    own = [t for t in checkpoint.tensors if t.tied_to is None]
    totals: dict[str, Any] = {
        "tensors": len(checkpoint.tensors),
        "elements": sum(t.numel for t in own),
        "parameters": checkpoint.parameters,
        "buffer_elements": sum(t.numel for t in own if t.buffer),
        "bytes": checkpoint.tensor_bytes,
        "dtypes": checkpoint.dtypes,
    }
    if scanned:
        read = [
            v for t, v in zip(checkpoint.tensors, scanned, strict=True) if t.tied_to is None and v.zeros is not None
        ]
        elements = sum(v.numel for v in read)
        zeros = sum(v.zeros or 0 for v in read)
        totals |= {
            "read_elements": elements,
            "zeros": zeros,
            "density": (elements - zeros) / elements if elements else None,
            "nans": sum(v.nans or 0 for v in read),
            "infs": sum(v.infs or 0 for v in read),
        }
    return totals


def _notes(checkpoint: Checkpoint, totals: Mapping[str, Any]) -> Iterable[str]:
    where = []
    if checkpoint.nested_under:
        where.append(f"the state dict is under {printable(checkpoint.nested_under)!r}")
    if checkpoint.prefix:
        where.append(f"every name begins with {checkpoint.prefix!r}, left out here")
    if where:
        yield "; ".join(where)
    buffers = f" and {_count(totals['buffer_elements'], 'buffer element')}" if totals["buffer_elements"] else ""
    dtypes = ", ".join(f"{n:,} {dtype}" for dtype, n in totals["dtypes"].items())
    yield f"{totals['parameters']:,} parameters{buffers} in {_count(totals['tensors'], 'tensor')} ({dtypes})"
    yield f"{totals['bytes']:,} bytes of tensors; {_size(checkpoint)}"
    tied = [t for t in checkpoint.tensors if t.tied_to is not None]
    if tied:
        pairs = [f"{printable(t.name)} = {printable(t.tied_to or '')}" for t in tied]
        yield f"tied, counted once: {_some(pairs)}"
    if blocks := [t.blocks for t in checkpoint.tensors if t.blocks and t.tied_to is None]:
        stored, elements = sum(b.layout.nnz for b in blocks), sum(b.layout.numel for b in blocks)
        yield (
            f"stored in blocks: {_count(len(blocks), 'weight')}, {stored:,} of {elements:,} elements, "
            f"density {stored / elements:.5f}; the others are zero and counted as no parameters"
        )
    if checkpoint.other:
        yield f"also in the file: {_some([_entry(e) for e in checkpoint.other])}"
    if checkpoint.metadata:
        yield f"metadata: {_some([f'{printable(k, 40)} = {printable(v, 60)}' for k, v in checkpoint.metadata.items()])}"
    yield from checkpoint.notes


def _size(checkpoint: Checkpoint) -> str:
    many = len(checkpoint.files)
    return f"{'the file has' if many == 1 else f'the {many} files have'} {checkpoint.file_bytes:,}"


def _entry(entry: OtherEntry) -> str:
    path = printable(entry.path, 60)
    return f"{path} ({entry.type})" if entry.value is None else f"{path} = {entry.value} ({entry.type})"


def _value_notes(totals: Mapping[str, Any], scanned: Sequence[TensorValues] | None) -> Iterable[str]:
    if scanned is None:
        return
    density = f", density {totals['density']:.5f}" if totals["density"] is not None else ""
    yield f"{totals['zeros']:,} of {totals['read_elements']:,} elements are exactly zero{density}"
    for what, count, names in (
        ("NaN", totals["nans"], [printable(v.name) for v in scanned if v.nans]),
        ("infinite", totals["infs"], [printable(v.name) for v in scanned if v.infs]),
    ):
        is_are = "is" if count == 1 else "are"
        yield f"{_count(count, 'element')} {is_are} {what}: {_some(names)}" if count else f"no element is {what}"
    if unread := [printable(v.name) for v in scanned if v.unread]:
        yield f"not read: {_some(unread)}"
    if any(word in v.label for v in scanned for word in ("blocks", "rows", "columns", "dim")):
        yield "rows are dim 0 (of a conv: output channels), columns all other dims (input channels x taps)"


def _match_notes(matches: Sequence[Match], near: Match | None, model: str | None, known: bool) -> Iterable[str]:
    if not known:
        yield "no zoo model to compare with: the model tables are not installed"
    elif not matches:
        closest_one = f"; the closest: {printable(near.sentence())}" if near else ""
        yield f"fits {'no zoo model' if model is None else f'{model} not at all'}{closest_one}"
    elif matches[0].kind == "exact":
        yield f"fits {' and '.join(printable(m.sentence()) for m in matches if m.kind == 'exact')}"
    else:
        yield f"fits {'; less well '.join(printable(m.sentence()) for m in matches[:2])}"
        if model is not None:
            yield from _details(matches[0])
    if near is not None and model is not None:
        yield from _details(near)


def _details(match: Match) -> Iterable[str]:
    shapes = [f"{d.name} is {list(d.found)}, not {list(d.expected)}" for d in match.differs]
    for what, names in (("other shape", shapes), ("missing", match.missing), ("not of the model", match.unexpected)):
        if names:
            yield f"  {what}: {_some([printable(name) for name in names])}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _some(items: Sequence[str]) -> str:
    return some_of(items, SHOWN)


def _payload(
    checkpoint: Checkpoint,
    totals: Mapping[str, Any],
    scanned: Sequence[TensorValues] | None,
    matches: Sequence[Match],
    near: Match | None,
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "files": [str(path) for path in checkpoint.files],
        "file_bytes": checkpoint.file_bytes,
        "nested_under": checkpoint.nested_under,
        "prefix": checkpoint.prefix,
        "other_entries": [asdict(entry) for entry in checkpoint.other],
        "metadata": dict(checkpoint.metadata),
        "notes": list(checkpoint.notes),
        "totals": dict(totals),
        "tensors": [_tensor(tensor, scanned[i] if scanned else None) for i, tensor in enumerate(checkpoint.tensors)],
        "fits": [_match(match) for match in matches],
        "closest": _match(near) if near else None,
    }


def _tensor(tensor: TensorInfo, values: TensorValues | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "elements": tensor.numel,
        "parameters": tensor.parameters,
        "bytes": tensor.nbytes,
        "buffer": tensor.buffer,
        "tied_to": tensor.tied_to,
        "blocks": _blocks(tensor.blocks) if tensor.blocks else None,
    }
    if values:
        facts |= {
            "zeros": values.zeros,
            "density": values.density,
            "nans": values.nans,
            "infs": values.infs,
            "unread": values.unread,
            "zeros_form": values.label,
            "pattern": _pattern(values.pattern),
        }
    return facts


def _blocks(blocks: StoredBlocks) -> dict[str, Any]:
    layout = blocks.layout
    return {
        "pattern": layout.pattern,
        "grid": list(layout.grid),
        "stored": layout.num_blocks,
        "nnz": layout.nnz,
        "density": blocks.density,
        "transposed": layout.transposed,
    }


def _pattern(pattern: Pattern | None) -> dict[str, Any] | None:
    return asdict(pattern) if pattern else None


def _match(match: Match) -> dict[str, Any]:
    return {**asdict(match), "similarity": match.similarity, "sentence": match.sentence()}
