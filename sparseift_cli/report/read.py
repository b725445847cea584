"""Read one run: a run directory, a folder of a kept run as older versions wrote it, or the one file of a kept run.

Whatever a run is read from, it is the same plain data. Files that many run directories share to the byte (plan, audit) and
recipes that differ in the seed alone are parsed once.
"""

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
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from ..base.metrics import WITHOUT_UNIT, MetricFacts, facts_of
from ..errors import ArtifactError, UsageError
from ..models.request import proper_source
from ..recipe import strict_yaml
from ..runs.directory import AUDIT, LOCK, METRICS, PLAN, PROVENANCE, RECIPE, SUMMARY
from ..runs.metrics import read_metrics
from ..runs.provenance import begun_as
from . import kept_file
from .renamed import todays_names

State = Literal["finished", "running", "stopped"]

STAMP = r"\d{8}T\d{6}Z-[0-9a-f]{8}(\.\d+)?"
"""The name of a run directory, and of a kept file without its suffix: when the run began, and the hash of its recipe."""
_SEED = re.compile(r"^(  seed: )(\d+)$", re.MULTILINE)
_SHARED_FOLDERS = {"results", "runs", "kept", ""}
"""Folders that hold runs of several recipes, so their names are not a recipe's."""
_LARGEST = 1 << 28  # bytes of one unpacked metrics file: far more than a run writes
_REQUIRED_SECTIONS = ("model", "data", "training")
_SECTIONS = ("transform", "algorithm", "init", "optimizer", "schedule", "evaluation", "checkpoint")
_STATUS = ("transformed", "boundary", "untouched", "mixed")


@dataclass(frozen=True, slots=True)
class Run:
    """One run as a report knows it.

    `state`: finished has a summary; running is locked by a live process; stopped is neither (it crashed or was interrupted).
    """

    path: Path
    """The run directory (`sparseift_cli.runs.directory`), or the file of a kept run."""
    name: str
    """The recipe's name, by which runs are grouped: resnet18_cifar100_wide75_rigl."""
    state: State
    seed: int | None
    recipe: Mapping[str, Any]
    """The resolved recipe."""
    metrics: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl, in the order of their steps."""
    summary: Mapping[str, Any] | None = None
    audit: Mapping[str, Any] | None = None
    """As `sparseift flops --json` prints it."""
    plan: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None
    warnings: Sequence[str] = field(default=())
    """What was wrong with it, though not so much that it had to be left out."""

    @property
    def last(self) -> Mapping[str, Any]:
        """The newest line of metrics; empty before the first."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def measured(self) -> Mapping[str, MetricFacts]:
        """What the newest session recorded of its metrics, by their names in the recipe; empty for older versions."""
        sessions = (self.provenance or {}).get("sessions") or [{}]
        recorded = sessions[-1].get("metrics") or {}
        return {name: MetricFacts.from_json(facts) for name, facts in recorded.items() if name != WITHOUT_UNIT}

    def metric_key(self, name: str) -> str:
        """The key in the lines of metrics of what the recipe calls `name`: `sure` for `own_metric:SURE`."""
        measured = self.measured
        return measured[name].name if name in measured else name

    def facts_of(self, metric: str) -> MetricFacts:
        """Label, unit and direction of a metric (a key of the lines of metrics)."""
        return facts_of(metric, {facts.name: facts for facts in self.measured.values()})

    @property
    def sweep(self) -> tuple[str, Mapping[str, Any]] | None:
        """The recipe of the sweep that the run belongs to, and its value on each axis by name; None where it belongs to none."""
        sessions = (self.provenance or {}).get("sessions") or [{}]
        found = sessions[-1].get("sweep")
        axes = found.get("axes") if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping) or not isinstance(axes, Mapping):
            return None
        single = {printable(str(k)): v for k, v in axes.items() if not isinstance(v, list | dict)}
        return printable(str(found.get("recipe"))), single

    @property
    def stamp(self) -> str:
        """`<utc>-<hash8>`, the same for a run directory and the file that it is kept in."""
        return self.path.resolve().name.removesuffix(".json")


class Damaged(Exception):
    """A run that cannot be used; `reason` says what is wrong with it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RunReader:
    """Reads runs, and remembers the content of files that many of them share."""

    def __init__(self) -> None:
        self._recipes: dict[str, Mapping[str, Any]] = {}
        self._json: dict[bytes, Mapping[str, Any]] = {}

    def read(self, path: Path) -> Run:
        """The run in the folder or file `path`.

        Raises:
            Damaged: its recipe, metrics or summary cannot be read, or are not what a run writes.
        """
        warnings: list[str] = []
        try:
            parts = self._kept_file(path, warnings) if path.is_file() else self._folder(path, warnings)
        except OSError as error:
            raise Damaged(f"cannot be read: {error.strerror or error}") from None
        summary, metrics = parts[SUMMARY], parts[METRICS]
        if summary is not None and metrics and metrics[-1].get("step") != summary["steps"]:
            warnings.append(f"{METRICS} ends at step {metrics[-1].get('step')}, {SUMMARY} at {summary['steps']}")
        if summary is not None and not metrics:
            metrics = [summary["metrics"]]
            warnings.append(f"no {METRICS}: only the last evaluation is known")
        if renamed := todays_names(parts[RECIPE], metrics, summary):
            parts[RECIPE], metrics, summary = renamed
        seed = (summary or {}).get("seed", parts[RECIPE]["training"].get("seed"))
        sessions = (parts[PROVENANCE] or {}).get("sessions") or ()
        name = begun_as(sessions) or (summary or {}).get("recipe")
        recipe = parts[RECIPE]
        if isinstance(model := recipe["model"].get("name"), str):  # a model that got a new name is still the same one
            recipe = {**recipe, "model": {**recipe["model"], "name": proper_source(model)}}
        return Run(
            path,
            printable(name if name and isinstance(name, str) else _name_by_path(path)),
            "finished" if summary is not None else "running" if is_locked(path) else "stopped",
            seed if isinstance(seed, int) else None,
            recipe,
            metrics,
            summary,
            parts[AUDIT],
            parts[PLAN],
            parts[PROVENANCE],
            tuple(warnings),
        )

    def _folder(self, folder: Path, warnings: list[str]) -> dict[str, Any]:
        content = _content(folder / SUMMARY)
        return {
            RECIPE: self._recipe(folder / RECIPE),
            SUMMARY: None if content is None else _checked_summary(_object(content, SUMMARY)),
            METRICS: _metrics(folder),
            **{name: self._optional(folder / name, warnings) for name in (PLAN, AUDIT, PROVENANCE)},
        }

    def _kept_file(self, path: Path, warnings: list[str]) -> dict[str, Any]:
        """The parts of a kept run under the names of the files that they were in."""
        try:
            kept = kept_file.decode(_content(path) or b"")
        except kept_file.NotAKeptRun as error:
            raise Damaged(f"foreign: {error}") from None
        except ValueError as error:
            raise Damaged(str(error)) from None
        recipe, metrics = printable(kept["recipe"]), kept["metrics"]
        _require_sections(recipe)
        if not _are_evaluations(metrics):
            raise Damaged("holds metrics that are not evaluations")
        parts = {RECIPE: recipe, SUMMARY: _checked_summary(kept["summary"]), METRICS: metrics, PLAN: None}
        for name, found in ((AUDIT, kept["audit"]), (PROVENANCE, kept["provenance"])):
            whole = isinstance(found, dict) and has_expected_form(name, found)
            parts[name] = printable(found) if whole else None
            if not whole:
                warnings.append(f"{name} is not what a run writes")
        return parts

    def _recipe(self, path: Path) -> Mapping[str, Any]:
        """The resolved recipe. Reading YAML strictly is slow, and runs of a recipe differ in one line: their seed's."""
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise Damaged(f"{RECIPE} is not text") from None
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

    def _optional(self, path: Path, warnings: list[str]) -> Mapping[str, Any] | None:
        """A file that a report can do without; what is wrong with it goes to `warnings`."""
        content = _content(path)
        if content is None:
            return None
        key = hashlib.sha256(content).digest()
        if key not in self._json:
            try:
                found = _object(content, path.name)
                if not has_expected_form(path.name, found):
                    raise Damaged(f"{path.name} is not what a run writes")
                self._json[key] = printable(found)
            except Damaged as damage:
                warnings.append(damage.reason)
                return None
        return self._json[key]


def is_kept_file(path: Path) -> bool:
    """Whether a file has the name of a kept run. Other files are read as one only where they are given by name."""
    return re.fullmatch(STAMP + r"\.json", path.name) is not None and path.is_file()


def is_locked(folder: Path) -> bool:
    """Whether a live process holds the run. A shared lock is taken and released at once, in microseconds."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the file system has no locks
        return False
    finally:
        os.close(handle)  # closing releases the lock
    return False


def number(value: Any) -> float | None:
    """A number that was in a JSON file (NaN and infinity included); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def printable(value: Any) -> Any:
    """A value of a file with no control character in any of its texts: one could recolour a terminal, or break an SVG.

    >>> printable({"name": "net\\x1b[31m"})
    {'name': 'net\\\\x1b[31m'}
    """
    if isinstance(value, str):
        return value if value.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in value)
    if isinstance(value, Mapping):
        return {printable(key): printable(inner) for key, inner in value.items()}
    return [printable(inner) for inner in value] if isinstance(value, list) else value


def has_expected_form(name: str, found: Mapping[str, Any]) -> bool:
    """Whether the parts of plan.json, audit.json or provenance.json that a report uses are there, with their types."""
    if name == PROVENANCE:
        sessions = found.get("sessions")
        return isinstance(sessions, list) and bool(sessions) and all(map(_is_session, sessions))
    layers = found.get("layers")
    if not isinstance(found.get("training"), dict | NoneType) or not isinstance(layers, list | NoneType):
        return False
    return name != AUDIT or (_are_totals(found.get("totals")) and all(map(_is_layer, layers or ())))


def _require_sections(recipe: Any) -> None:
    """Short forms (`data: cifar100`) are written out in a resolved recipe: a section is a mapping, or not there."""
    found = recipe if isinstance(recipe, dict) else {}
    for name in _REQUIRED_SECTIONS:
        if not isinstance(found.get(name), dict):
            raise Damaged(f"{RECIPE} is not a resolved recipe: it has no section {name}")
    for name in _SECTIONS:
        if not isinstance(found.get(name), dict | NoneType):
            raise Damaged(f"{RECIPE} is not a resolved recipe: {name} is not a section")
    if not isinstance((found.get("evaluation") or {}).get("metrics", []), list):
        raise Damaged(f"{RECIPE} is not a resolved recipe: evaluation.metrics is not a list")


def _checked_summary(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    if not str(summary.get("schema", "")).startswith("sparseift.summary/"):
        raise Damaged(f"{SUMMARY} is of the format {summary.get('schema')!r}, not 'sparseift.summary/1'")
    steps, metrics = summary.get("steps"), summary.get("metrics")
    if not _is_count(steps) or not isinstance(metrics, dict) or not isinstance(summary.get("flops"), dict):
        raise Damaged(f"{SUMMARY} lacks its steps, metrics or flops")
    return summary


def _metrics(folder: Path) -> Sequence[Mapping[str, Any]]:
    """The lines of metrics.jsonl, or of metrics.jsonl.gz, as which older versions kept it."""
    plain, packed = folder / METRICS, folder / f"{METRICS}.gz"
    content = _content(plain)
    if content is None and (compressed := _content(packed)) is not None:
        try:
            with gzip.open(BytesIO(compressed)) as stream:
                content = stream.read(_LARGEST + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise Damaged(f"{packed.name} is cut short or not a gzip file") from None
    content = content or b""
    if len(content) > _LARGEST:
        raise Damaged(f"{METRICS} is larger than {_LARGEST:,} bytes")
    lines = content.split(b"\n")[:-1]  # the writer has not finished a line without a line break
    try:  # one call for all lines, so that the parser makes each key's string once
        rows = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        rows = []
    if len(rows) == len(lines) and _are_evaluations(rows):
        return rows
    if plain.exists():
        try:
            list(read_metrics(plain))  # its error names the line
        except (ArtifactError, RecursionError) as error:
            raise Damaged(str(error).replace(f"{plain}:", f"{METRICS}:")) from None
    raise Damaged(f"{METRICS} holds lines that are not evaluations")


def _are_evaluations(rows: Sequence[Any]) -> bool:
    return all(isinstance(row, dict) and _is_count(row.get("step")) for row in rows)


def _content(path: Path) -> bytes | None:
    """The bytes of a file; None where there is none. A pipe or a device would never end."""
    if not path.exists():
        return None
    if not path.is_file():
        raise Damaged(f"{path.name} is not a file")
    return path.read_bytes()


def _object(content: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise Damaged(f"{name} is not JSON") from None
    if not isinstance(found, dict):
        raise Damaged(f"{name} is not a JSON object")
    return found


def _name_by_path(path: Path) -> str:
    """The recipe's name of a run that does not record it: that of the folder above, as `train` makes it."""
    absolute = path.resolve()
    name, parent = absolute.name.removesuffix(".json"), absolute.parent.name
    return parent if re.fullmatch(STAMP, name) or parent not in _SHARED_FOLDERS else name


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _is_session(session: Any) -> bool:
    if not isinstance(session, dict):
        return False
    if not all(
        isinstance(session.get(k), dict | NoneType) for k in ("versions", "git", "data", "source", "environment")
    ):
        return False
    texts = [session.get(k) for k in ("started", "device", "device_name", "recipe")]
    if not isinstance(session.get("metrics"), dict | NoneType):
        return False
    texts += [(session.get("git") or {}).get("commit"), (session.get("versions") or {}).get("torch")]
    at_once = session.get("at_once")
    return (
        all(isinstance(text, str | NoneType) for text in texts)
        and isinstance(session.get("threads"), int | NoneType)
        and all(map(_are_metric_facts, (session.get("metrics") or {}).values()))
        and isinstance(session.get("kernels"), list | NoneType)
        and all(map(_is_kernel_group, session.get("kernels") or []))
        and (at_once is None or (_is_count(at_once) and at_once > 0))
    )


def _are_metric_facts(facts: Any) -> bool:
    return (
        isinstance(facts, dict)
        and all(isinstance(facts.get(k), str) for k in ("key", "label", "unit"))
        and isinstance(facts.get("lower_is_better"), bool)
    )


def _is_kernel_group(group: Any) -> bool:
    return (
        isinstance(group, dict)
        and all(isinstance(group.get(k), str) for k in ("backend", "reason", "how"))
        and isinstance(group.get("block", ""), int | NoneType)
        and isinstance(group.get("weights"), list)
        and all(isinstance(name, str) for name in group["weights"])
    )


def _are_totals(totals: Any) -> bool:
    sides = ("dense", "transformed")
    return totals is None or (
        isinstance(totals, dict) and all(isinstance(totals.get(k), dict | NoneType) for k in sides)
    )


def _is_layer(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and row.get("status") in _STATUS
        and all(_is_nonnegative(row.get(k)) for k in ("dense_macs", "transformed_macs"))
        and all(row.get(k) is None or _is_nonnegative(row[k]) for k in ("nnz", "weights"))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_nonnegative(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300
