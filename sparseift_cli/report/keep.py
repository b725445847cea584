"""Keep finished runs for good: one file a run, without checkpoints and without anything that names a machine.

    FOLDER/<recipe>/<utc>-<hash8>.json      (`kept_file`)

The same run always gives the same bytes, so keeping it twice changes nothing. What is changed on the way:

- Of every path that is absolute, begins with `~` or goes up (`..`), only the last part is kept: in the command line
  (`--runs=/data/me/runs` becomes `--runs=runs`), in the recipe (`data.root`; so its hash is no longer the one in the file's
  name) and in any other value. Of a recipe in a folder `recipes`, what follows that folder is kept: the name of a shipped one.
  Paths below the folder in which the run began stay as they are.
- The program of a command is `sparseift`, whatever interpreter and folder it was started from.
- The summary's `path` is `<recipe>/<utc>-<hash8>`.
- The plan, the lock and its process number are left out; the audit has the plan's layers.

Older versions kept a folder of five files for each run. A folder of the same run is replaced by its file:
`sparseift report keep kept/ -o kept/` brings a whole collection up to date.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from ..base.atomic import write_file
from ..errors import ArtifactError, UsageError
from ..runs.directory import AUDIT, METRICS, PROVENANCE, RECIPE, SUMMARY
from . import kept_file
from .collect import collect
from .read import Damaged, Run, RunReader

_OLD_FILES = {RECIPE, f"{METRICS}.gz", SUMMARY, AUDIT, PROVENANCE}
"""What the folder of a kept run held in older versions."""
_PROGRAMS = ("sparseift", "__main__.py")
_MOST_NAMED = 20


@dataclass(frozen=True, slots=True)
class KeptRun:
    """One run, the file that it is kept in, how large that is, and whether anything was written."""

    run: Run
    path: Path
    bytes: int
    state: Literal["new", "unchanged", "replaced"]


def keep(paths: Sequence[Path], folder: Path) -> list[KeptRun]:
    """Write every run below `paths` to a file in `folder`. Nothing is written unless every one of them can be kept.

    Raises:
        UsageError: a path is not there or holds no run, or a run is not finished; all of them are named.
        ArtifactError: a run is damaged, another run is in its place, or the folder cannot be written.
    """
    found = collect(paths)
    if found.damaged:
        raise ArtifactError(
            f"these cannot be kept:{_list(f'{path}: {reason}' for path, reason in found.skipped)}",
            hint="give finished runs alone",
        )
    if not found.runs:
        raise UsageError(
            f"no run in {', '.join(map(str, paths))}", hint="give run directories, or folders of them: runs/"
        )
    if unfinished := [run for run in found.runs if run.state != "finished"]:
        raise UsageError(
            f"these are not finished:{_list(f'{run.path}: {run.state}' for run in unfinished)}",
            hint="finish them with sparseift train --resume, or give the finished ones alone",
        )
    contents = [(run, folder / run.name / f"{run.stamp}.json", content(run)) for run in found.runs]
    for _, path, new in contents:
        _require_same_run(path, new)
    try:
        return [_write(run, path, new) for run, path, new in contents]
    except OSError as error:
        raise ArtifactError(
            f"cannot write {folder}: {error.strerror or error}", hint="give -o a writable place"
        ) from None


def content(run: Run) -> bytes:
    """The bytes of the file that keeps `run`.

    Raises:
        ArtifactError: a part of the run is missing.
    """
    summary = {**(run.summary or {}), "path": f"{run.name}/{run.stamp}"}
    parts = {RECIPE: run.recipe, SUMMARY: summary, AUDIT: run.audit, PROVENANCE: run.provenance}
    if lacking := [name for name, part in parts.items() if not part]:
        raise ArtifactError(f"{run.path}: {' and '.join(lacking)} cannot be read", hint="this run cannot be kept")
    if run.path.is_dir() and not any((run.path / name).exists() for name in (METRICS, f"{METRICS}.gz")):
        raise ArtifactError(f"{run.path}: there is no {METRICS}", hint="this run cannot be kept")
    named = {name.partition(".")[0]: _without_private_paths(part) for name, part in parts.items()}
    return kept_file.encode({**named, "metrics": run.metrics})


def local(text: str) -> str:
    """A text without private paths: of a path that is absolute or leaves its folder, the last part.

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


def _without_private_paths(value: Any, key: str = "") -> Any:
    """A JSON value with every text made `local`; a command begins with the program's plain name."""
    if isinstance(value, Mapping):
        return {local(str(k)): _without_private_paths(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        items = [_without_private_paths(item) for item in value]
        return ["sparseift", *items[1:]] if key == "command" and items and items[0] in _PROGRAMS else items
    return local(value) if isinstance(value, str) else value


def _require_same_run(path: Path, new: bytes) -> None:
    """Refuse to replace another run, or a folder that holds more than a kept run."""
    old, folder = None, path.with_suffix("")
    try:
        if path.exists():
            old = RunReader().read(path)
        elif folder.is_dir():
            old = RunReader().read(folder) if {p.name for p in folder.iterdir()} <= _OLD_FILES else None
        else:
            return
    except Damaged:
        old = None
    if old is None or _as_text(old.summary) != _as_text(kept_file.decode(new)["summary"]):
        where = path if path.exists() else folder
        raise ArtifactError(f"{where} holds something else", hint="remove it, or keep the runs in another folder")


def _as_text(summary: Mapping[str, Any] | None) -> str:
    """Equal where summaries are: as values, one with a NaN differs from itself."""
    return json.dumps(summary, sort_keys=True)


def _write(run: Run, path: Path, new: bytes) -> KeptRun:
    old_folder = path.with_suffix("")
    if path.exists() and path.read_bytes() == new:
        return KeptRun(run, path, len(new), "unchanged")
    existed = path.exists() or old_folder.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, new)
    if old_folder.is_dir():
        shutil.rmtree(old_folder)
    return KeptRun(run, path, len(new), "replaced" if existed else "new")


def _list(lines: Iterator[str]) -> str:
    every = list(lines)
    more = [f"... and {len(every) - _MOST_NAMED} more"] if len(every) > _MOST_NAMED else []
    return "".join(f"\n  {line}" for line in [*every[:_MOST_NAMED], *more])
