"""Keep finished runs for good: their small files, without checkpoints and without what is a machine's own.

    FOLDER/<recipe>/<utc>-<hash>/
        recipe.yaml  metrics.jsonl.gz  summary.json  audit.json  provenance.json

The same run always gives the same bytes, so keeping it twice changes nothing. What is changed on the way:

- metrics.jsonl is packed, with a time stamp of 0 and no name inside.
- Of every path that is absolute, begins with `~` or goes up (`..`), the last part alone stays: in the command line of
  provenance.json (`--runs=/data/me/runs` becomes `--runs=runs`), in recipe.yaml (`data.root`; so its hash is no longer the one
  in the folder's name) and in any other value. Of a recipe in a folder `recipes`, what follows that folder stays: the name
  of a shipped one. Paths below the folder in which the run began stay as they are.
- The program of a command is `sparseift`, whatever interpreter and folder it was started from.
- summary.json's `path` is `<recipe>/<utc>-<hash>`.
- The plan, the lock and its process number are left out; the audit has the plan's layers.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from ..errors import ArtifactError, UsageError
from ..runs.directory import AUDIT, METRICS, PROVENANCE, RECIPE, SUMMARY
from .collect import collect
from .record import Run

PACKED = f"{METRICS}.gz"
_PROGRAMS = ("sparseift", "__main__.py")
_SCALAR = re.compile(r'^(\s*(?:- )?[\w.]+: )(["\']?)(.+?)(\2)$', re.MULTILINE)
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Kept:
    """One run, where it lies now, how large it is there, and whether anything was written for it."""

    run: Run
    path: Path
    bytes: int
    state: Literal["new", "unchanged", "replaced"]


def keep(paths: Sequence[Path], folder: Path) -> list[Kept]:
    """Copy every run below `paths` to `folder`. Nothing is written unless every one of them can be kept.

    Raises:
        UsageError: a path is not there or holds no run, or a run is not finished; all of them are named.
        ArtifactError: a run is damaged, another run is in its place, or the folder cannot be written.
    """
    found = collect(paths)
    if found.damaged:
        raise ArtifactError(
            f"these cannot be kept:{_named(f'{path}: {reason}' for path, reason in found.skipped)}",
            hint="give finished runs alone",
        )
    if not found.runs:
        raise UsageError(
            f"no run in {', '.join(map(str, paths))}", hint="give run directories, or folders of them: runs/"
        )
    if unfinished := [run for run in found.runs if run.state != "finished"]:
        raise UsageError(
            f"these are not finished:{_named(f'{run.path}: {run.state}' for run in unfinished)}",
            hint="finish them with sparseift train --resume, or give the finished ones alone",
        )
    files = {run.path: kept_files(run) for run in found.runs}
    places = {run.path: folder / run.name / run.path.resolve().name for run in found.runs}
    for run in found.runs:
        _require_same(places[run.path], files[run.path])
    try:
        return [_write(run, places[run.path], files[run.path]) for run in found.runs]
    except OSError as error:
        raise ArtifactError(
            f"cannot write {folder}: {error.strerror or error}", hint="give -o a writable place"
        ) from None


def kept_files(run: Run) -> dict[str, bytes]:
    """The content of every file that is kept, by its name.

    Raises:
        ArtifactError: a file is not there.
    """
    summary = {**(run.summary or {}), "path": f"{run.name}/{run.path.resolve().name}"}
    documents = {SUMMARY: summary, AUDIT: run.audit, PROVENANCE: run.provenance}
    if lacking := [name for name, document in documents.items() if not document]:
        raise ArtifactError(f"{run.path}: {' and '.join(lacking)} cannot be read", hint="this run cannot be kept")
    recipe = _SCALAR.sub(lambda m: m[1] + m[2] + local(m[3]) + m[4], (run.path / RECIPE).read_text("utf-8"))
    plain, packed = run.path / METRICS, run.path / PACKED
    if not plain.exists() and not packed.exists():
        raise ArtifactError(f"{run.path}: there is no {METRICS}", hint="this run cannot be kept")
    metrics = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    return {
        RECIPE: recipe.encode(),
        PACKED: gzip.compress(metrics, mtime=0),
        **{name: (json.dumps(_plain(document), indent=1) + "\n").encode() for name, document in documents.items()},
    }


def local(text: str) -> str:
    """A text without what is a machine's own: of a path that is absolute or leaves its folder, the last part.

    >>> local("/data/me/runs"), local("data.root=/data/me/c100"), local("runs/a"), local("hf:../../me/llama")
    ('runs', 'data.root=c100', 'runs/a', 'hf:llama')
    """
    if "://" in text:
        return text
    windows = re.match(r"[A-Za-z]:[\\/]", text)
    if recipe := re.fullmatch(r".*/recipes/([\w.-]+/[\w.-]+\.ya?ml)", text):
        return recipe[1]
    if windows or text == ".." or text.startswith(("/", "~", "../")):
        return PureWindowsPath(text).name if windows else PurePosixPath(text).name
    for sign in ("=", ":"):
        before, found, after = text.partition(sign)
        if found:
            return local(before) + found + local(after)
    return PurePosixPath(text).name if "/../" in text or text.endswith("/..") else text


def _plain(value: Any, key: str = "") -> Any:
    """A JSON value with every text made `local`; a command begins with the program's plain name."""
    if isinstance(value, Mapping):
        return {local(str(k)): _plain(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        items = [_plain(item) for item in value]
        return ["sparseift", *items[1:]] if key == "command" and items and items[0] in _PROGRAMS else items
    return local(value) if isinstance(value, str) else value


def _require_same(place: Path, files: Mapping[str, bytes]) -> None:
    """Refuse to put a run in the place of another one."""
    before = place / SUMMARY
    if place.exists() and (not before.is_file() or before.read_bytes() != files[SUMMARY]):
        raise ArtifactError(f"{place} holds something else", hint="remove it, or keep the runs in another folder")


def _write(run: Run, place: Path, files: Mapping[str, bytes]) -> Kept:
    size = sum(map(len, files.values()))
    existed = place.exists()
    if existed and _same(place, files):
        return Kept(run, place, size, "unchanged")
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        temporary.chmod(0o755)
        if existed:
            shutil.rmtree(place)
        os.replace(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Kept(run, place, size, "replaced" if existed else "new")


def _same(place: Path, files: Mapping[str, bytes]) -> bool:
    """Whether exactly these files are there already; of metrics by content: compressors differ between machines."""
    there = {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()}
    try:
        for part in (there, files := dict(files)):
            part[METRICS] = gzip.decompress(part.pop(PACKED, b""))
    except (OSError, EOFError, zlib.error):
        return False
    return there == files


def _named(lines: Iterator[str]) -> str:
    every = list(lines)
    more = [f"... and {len(every) - _SHOWN} more"] if len(every) > _SHOWN else []
    return "".join(f"\n  {line}" for line in [*every[:_SHOWN], *more])
