"""From paths to runs: find every run below them, read each once, and name what had to be left out.

A run is a folder with recipe.yaml (`runs.directory`), or a file `<utc>-<hash8>.json` (`report keep`). Nothing in a damaged or
foreign folder stops the others from being read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError
from ..runs.directory import AUDIT, METRICS, PLAN, PROVENANCE, RECIPE, SUMMARY
from .read import Damaged, Run, RunReader, is_kept_file

RUN_FILES = (RECIPE, SUMMARY, METRICS, f"{METRICS}.gz", PROVENANCE)
"""A folder with one of these is a run directory, or part of one."""
TABLE = "table.json"  # of a folder that `sparseift transform` wrote
_FOREIGN = ("foreign", "holds no run", "a transformed model")
_DEEPEST = 12  # folders below a given path


@dataclass(slots=True)
class Collected:
    """The runs, in the order of the paths given and by name below each, and what was left out."""

    runs: list[Run] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def damaged(self) -> bool:
        """Whether something that a run wrote was left out, not only foreign folders."""
        return any(not reason.startswith(_FOREIGN) for _, reason in self.skipped)


def collect(paths: Sequence[Path]) -> Collected:
    """Read every run below `paths`: single runs, folders of them at any depth, or any mix. A run given twice counts once.

    Raises:
        UsageError: a path does not exist, or is a file but not one that `report keep` wrote.
    """
    found, reader, seen = Collected(), RunReader(), set[Path]()
    for path in paths:
        if not path.is_dir() and not (path.is_file() and path.suffix == ".json"):
            what = "is a file, not a folder or a kept run" if path.exists() else "is not there"
            raise UsageError(f"{path} {what}", hint="give run directories, or folders that hold some: runs/")
        before = len(found.runs), len(found.skipped)
        for candidate, reason in _candidates(path, found.skipped):
            real = candidate.resolve()
            if real in seen:
                before = (-1, -1)  # it is known already, so the path is not empty
                continue
            seen.add(real)
            try:
                if reason:
                    raise Damaged(reason)
                found.runs.append(reader.read(candidate))
            except Damaged as damage:
                found.skipped.append((candidate, damage.reason))
        if (len(found.runs), len(found.skipped)) == before:
            found.skipped.append((path, f"holds no run: neither {RECIPE} nor a kept run in it or below"))
    return found


def _candidates(top: Path, skipped: list[tuple[Path, str]]) -> Iterator[tuple[Path, str]]:
    """(path, "") of every run, (folder, reason) of every incomplete one; foreign folders go to `skipped`."""
    if top.is_file():
        yield top, ""
    elif (reason := _run_or_reason(top)) is not None:
        yield top, reason
    else:
        yield from _below(top, skipped, 0)


def _below(folder: Path, skipped: list[tuple[Path, str]], depth: int) -> Iterator[tuple[Path, str]]:
    for child in _children(folder, skipped):
        if child.is_file():
            yield child, ""
        elif (reason := _run_or_reason(child)) is not None:
            yield child, reason
        elif depth >= _DEEPEST:
            skipped.append((child, f"more than {_DEEPEST} folders down: not searched"))
        elif not _holds_any(child, depth + 1):
            skipped.append((child, f"foreign: neither {RECIPE} nor a kept run in it or below"))
        else:
            yield from _below(child, skipped, depth + 1)


def _children(folder: Path, skipped: list[tuple[Path, str]] | None = None) -> list[Path]:
    """Folders and kept runs in `folder` by name. Hidden folders and caches hold no runs; links may lead in circles."""
    try:
        with os.scandir(folder) as entries:
            found = [(e.name, e.is_dir() and e.is_symlink()) for e in entries if e.is_dir() or is_kept_file(Path(e))]
    except OSError as error:
        if skipped is not None:
            skipped.append((folder, f"cannot be read: {error.strerror}"))
        return []
    found = sorted(each for each in found if not each[0].startswith((".", "__pycache__")))
    if skipped is not None:
        skipped += [(folder / name, "foreign: a link to a folder is not followed") for name, link in found if link]
    return [folder / name for name, link in found if not link]


def _holds_any(folder: Path, depth: int) -> bool:
    """Whether a run, an incomplete one, or a folder that cannot be read, is somewhere below."""
    if depth > _DEEPEST or not os.access(folder, os.R_OK | os.X_OK):
        return True  # `_below` comes to it and names it
    return any(
        child.is_file() or _run_or_reason(child) is not None or _holds_any(child, depth + 1)
        for child in _children(folder)
    )


def _run_or_reason(folder: Path) -> str | None:
    """None: an ordinary folder. "": a run directory. Otherwise why it is not a whole one."""
    try:
        inside = [name for name in RUN_FILES if (folder / name).is_file()]
    except OSError:
        return None
    if RECIPE in inside:
        return ""
    if (folder / TABLE).is_file() and (folder / PLAN).is_file():
        return "a transformed model, not a run: sparseift inspect shows it"
    if inside or (folder / AUDIT).is_file():  # plan and audit are written before the recipe, with which a run begins
        return f"no {RECIPE}: never begun, or not a run of sparseift"
    return None
