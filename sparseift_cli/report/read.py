"""Read one run directory. Files that seeds share to the byte (plan, audit) are parsed and kept once."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import NoneType
from typing import Any

from ..errors import ArtifactError, UsageError
from ..models.request import proper_source
from ..recipe import strict_yaml
from ..runs.directory import AUDIT, LOCK, METRICS, PLAN, PROVENANCE, RECIPE, SUMMARY
from ..runs.metrics import read_metrics
from ..runs.provenance import begun_as
from .record import Run, State
from .shape import is_whole, printable

_STAMPED = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}(\.\d+)?")
_SEED = re.compile(r"^(  seed: )(\d+)$", re.MULTILINE)
_SHELVES = {"results", "runs", "kept", ""}
"""Folders that hold runs of several recipes, so their names are no recipe's."""
_LARGEST = 1 << 28  # bytes of one unpacked metrics file: far more than a run writes
_NEEDED = ("model", "data", "training")
_SECTIONS = ("transform", "algorithm", "init", "optimizer", "schedule", "evaluation", "checkpoint")


class Damaged(Exception):
    """A directory that cannot be used; `reason` says what is wrong with it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Files:
    """Reads run directories, and remembers the content of files that many of them share."""

    def __init__(self) -> None:
        self._recipes: dict[str, Mapping[str, Any]] = {}
        self._json: dict[bytes, Mapping[str, Any]] = {}

    def run(self, folder: Path) -> Run:
        """The run in `folder`.

        Raises:
            Damaged: its recipe, metrics or summary cannot be read, or are not what a run writes.
        """
        try:
            warnings: list[str] = []
            recipe = self._recipe(folder / RECIPE)
            summary = self._summary(folder / SUMMARY)
            metrics = _metrics(folder)
            beside = {name: self._beside(folder / name, warnings) for name in (PLAN, AUDIT, PROVENANCE)}
        except OSError as error:
            raise Damaged(f"cannot be read: {error.strerror or error}") from None
        if summary is not None and metrics and metrics[-1].get("step") != summary["steps"]:
            warnings.append(f"{METRICS} ends at step {metrics[-1].get('step')}, {SUMMARY} at {summary['steps']}")
        if summary is not None and not metrics:
            metrics = [summary["metrics"]]
            warnings.append(f"no {METRICS}: only the last evaluation is known")
        state: State = "finished" if summary is not None else "running" if is_locked(folder) else "stopped"
        seed = (summary or {}).get("seed", recipe["training"].get("seed"))
        sessions = (beside[PROVENANCE] or {}).get("sessions") or ()
        named = begun_as(sessions) or (summary or {}).get("recipe")
        name = named if named and isinstance(named, str) else _name(folder)
        return Run(
            folder,
            printable(name),
            state,
            seed if isinstance(seed, int) else None,
            recipe,
            metrics,
            summary,
            beside[AUDIT],
            beside[PLAN],
            beside[PROVENANCE],
            tuple(warnings),
        )

    def _recipe(self, path: Path) -> Mapping[str, Any]:
        """The resolved recipe. Reading YAML strictly is slow, and runs of a recipe differ in one line: their seed's."""
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise Damaged(f"{RECIPE} is no text") from None
        seeds = _SEED.findall(text)
        key = _SEED.sub(r"\1", text) if len(seeds) == 1 else text
        if key not in self._recipes:
            try:
                document, problems = strict_yaml.read(path)
                problems.stop(f"{RECIPE} has problems:")
            except UsageError as error:
                raise Damaged(" ".join(error.message.replace(f"{path}:", f"{RECIPE}:").split())) from None
            found = printable(document.plain())
            _require_sections(found)
            found["model"] = {**found["model"], "name": proper_source(str(found["model"].get("name")))}
            self._recipes[key] = found
        recipe = self._recipes[key]
        if len(seeds) == 1:
            recipe = {**recipe, "training": {**recipe["training"], "seed": int(seeds[0][1])}}
        return recipe

    def _summary(self, path: Path) -> Mapping[str, Any] | None:
        content = _content(path)
        if content is None:
            return None
        found = _object(content, SUMMARY)
        if not str(found.get("schema", "")).startswith("sparseift.summary/"):
            raise Damaged(f"{SUMMARY} is of the format {found.get('schema')!r}, not 'sparseift.summary/1'")
        steps, metrics = found.get("steps"), found.get("metrics")
        if not _is_count(steps) or not isinstance(metrics, dict) or not isinstance(found.get("flops"), dict):
            raise Damaged(f"{SUMMARY} lacks its steps, metrics or flops")
        return found

    def _beside(self, path: Path, warnings: list[str]) -> Mapping[str, Any] | None:
        """A file that a report can do without; what is wrong with it goes to `warnings`."""
        content = _content(path)
        if content is None:
            return None
        key = hashlib.sha256(content).digest()
        if key not in self._json:
            try:
                found = _object(content, path.name)
                if not is_whole(path.name, found):
                    raise Damaged(f"{path.name} is not what a run writes")
                self._json[key] = printable(found)
            except Damaged as damage:
                warnings.append(damage.reason)
                return None
        return self._json[key]


def _require_sections(recipe: Any) -> None:
    """Short forms (`data: cifar100`) are written out in a resolved recipe: a section is a mapping, or not there."""
    found = recipe if isinstance(recipe, dict) else {}
    for name in _NEEDED:
        if not isinstance(found.get(name), dict):
            raise Damaged(f"{RECIPE} is no resolved recipe: it has no section {name}")
    for name in _SECTIONS:
        if not isinstance(found.get(name), dict | NoneType):
            raise Damaged(f"{RECIPE} is no resolved recipe: {name} is no section")
    if not isinstance((found.get("evaluation") or {}).get("metrics", []), list):
        raise Damaged(f"{RECIPE} is no resolved recipe: evaluation.metrics is no list")


def is_locked(folder: Path) -> bool:
    """Whether a live process holds the run. A shared lock is asked for and given back at once, in microseconds."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks knows nothing
        return False
    finally:
        os.close(handle)  # which frees it
    return False


def _metrics(folder: Path) -> Sequence[Mapping[str, Any]]:
    plain, packed = folder / METRICS, folder / f"{METRICS}.gz"
    content = _content(plain)
    if content is None and (squeezed := _content(packed)) is not None:
        try:
            with gzip.open(BytesIO(squeezed)) as stream:
                content = stream.read(_LARGEST + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise Damaged(f"{packed.name} is cut short or no gzip file") from None
    content = content or b""
    if len(content) > _LARGEST:
        raise Damaged(f"{METRICS} is larger than {_LARGEST:,} bytes")
    lines = content.split(b"\n")[:-1]  # half a line at the end is no line yet
    try:  # all at once: the names of the columns are then kept once a file
        rows = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        rows = []
    if len(rows) == len(lines) and all(isinstance(row, dict) and _is_count(row.get("step")) for row in rows):
        return rows
    if plain.exists():
        try:
            list(read_metrics(plain))  # it says which line
        except (ArtifactError, RecursionError) as error:
            raise Damaged(str(error).replace(f"{plain}:", f"{METRICS}:")) from None
    raise Damaged(f"{METRICS} holds lines that are no evaluations")


def _content(path: Path) -> bytes | None:
    """The bytes of a file; None where there is none. A pipe or a device would never end."""
    if not path.exists():
        return None
    if not path.is_file():
        raise Damaged(f"{path.name} is no file")
    return path.read_bytes()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _object(content: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise Damaged(f"{name} is no JSON") from None
    if not isinstance(found, dict):
        raise Damaged(f"{name} is no JSON object")
    return found


def _name(folder: Path) -> str:
    """The recipe's name of a run without a summary: that of the folder above, as `train` lays it out."""
    absolute = folder.resolve()
    parent = absolute.parent.name
    return parent if _STAMPED.fullmatch(absolute.name) or parent not in _SHELVES else absolute.name


def number(value: Any) -> float | None:
    """A number that was in a JSON file (NaN and infinity included); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
