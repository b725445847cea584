"""Checkpoints: whole or not there, and never trusted before every byte of them was checked.

    checkpoints/step-00000500/
        tensors.safetensors   weights, masks, optimiser state
        state.json            everything that is no tensor
        manifest.json         step, score, the length and SHA-256 of the other two, and a SHA-256 of itself

A checkpoint is written to a hidden folder, every file flushed to disk, then renamed, then the rename flushed: whenever the
machine stops, the folder `checkpoints` holds only whole ones, and the one before is still there. The newest `keep` and
the best are kept. Saving a step that is there already adds `step-00000500.1`: nothing valid is ever in the way.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..base import atomic
from ..errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "sparseift.checkpoint/1"
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Skipped:
    """A checkpoint that was passed over, and what is wrong with it."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint whose every byte is as it was written. Tensors are on the CPU."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    path: Path
    score: float | None = None
    metrics_bytes: int | None = None
    """Length of metrics.jsonl when it was written."""
    skipped: tuple[Skipped, ...] = field(default=())
    """Newer ones that did not verify."""


class Checkpoints:
    """The folder of checkpoints of one run. The process that writes holds the run's lock.

    `better` says whether the best score is the highest or the lowest.
    """

    def __init__(self, folder: Path, *, keep: int = 2, better: Literal["highest", "lowest"] = "highest") -> None:
        self.folder = folder
        self.keep = keep
        self.better = better

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        metrics_bytes: int | None = None,
    ) -> Path:
        """Write a checkpoint of `step`, then delete those that are neither among the newest `keep` nor the best.

        `state` is JSON; tensors [*] may be on any device and share memory. `score` is what `best` compares.

        Raises:
            ArtifactError: it cannot be written. Those before it are untouched.
            TypeError: the state is not JSON. Nothing was written.
        """
        _require_text_keys(state)
        content = atomic.as_json(state)
        with atomic.explain_os_errors("write", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            with atomic.temporary_folder(self.folder / f"step-{step:08d}") as temporary:
                temporary.chmod(self.folder.stat().st_mode & 0o777)
                self._write(temporary, step, tensors, content, score, metrics_bytes)
                target = self._free(step)
                temporary.rename(target)
            atomic.sync_folder(self.folder)
        with suppress(OSError):  # the checkpoint is safe; what cannot be deleted now is tried again next time
            self._prune()
        return target

    def newest(self) -> Loaded | None:
        """The newest checkpoint that verifies; None where there is none at all.

        Raises:
            ArtifactError: there are some, and none of them verifies.
        """
        return self._first_valid(sorted(self._all(), reverse=True))

    def best(self) -> Loaded | None:
        """The checkpoint with the best score that verifies; None where no checkpoint has a score.

        Raises:
            ArtifactError: there are some, and none of them verifies.
        """
        return self._first_valid(self._by_score())

    def at(self, step: int) -> Loaded | None:
        """The checkpoint of that step that verifies, of several the newest; None where there is none.

        Raises:
            ArtifactError: there are some, and none of them verifies.
        """
        return self._first_valid(sorted((entry for entry in self._all() if entry[0] == step), reverse=True))

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first; whether they verify is not asked."""
        return sorted({step for step, _, _ in self._all()})

    def _write(
        self,
        folder: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        content: bytes,
        score: float | None,
        metrics_bytes: int | None,
    ) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(_alone(tensors), folder / TENSORS)
        except SafetensorError as error:
            raise ArtifactError(f"cannot write {folder / TENSORS}: {error}", hint="is there space?") from error
        (folder / STATE).write_bytes(content)
        files: dict[str, Any] = {}
        for name in (TENSORS, STATE):
            atomic.sync_file(folder / name)
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        manifest = {"schema": SCHEMA, "step": step, "score": score, "metrics_bytes": metrics_bytes, "files": files}
        (folder / MANIFEST).write_bytes(atomic.as_json(manifest | {"sha256": _own_hash(manifest)}))
        atomic.sync_file(folder / MANIFEST)
        atomic.sync_folder(folder)

    def _free(self, step: int) -> Path:
        """A name for this step that no folder has, later than those that have it."""
        taken = [again for other, again, _ in self._all() if other == step]
        return self.folder / (f"step-{step:08d}.{max(taken) + 1}" if taken else f"step-{step:08d}")

    def _all(self) -> Iterator[tuple[int, int, Path]]:
        """(step, how often it was saved before, folder) of every checkpoint."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if found := _NAME.fullmatch(path.name):
                    yield int(found[1]), int(found[2] or 0), path

    def _by_score(self) -> list[tuple[int, int, Path]]:
        """Those with a score, the best first; of equal ones the earlier."""
        scored = [(score, entry) for entry in self._all() if (score := _score(entry[2])) is not None]
        sign = -1 if self.better == "highest" else 1
        return [entry for _, entry in sorted(scored, key=lambda pair: (sign * pair[0], pair[1][:2]))]

    def _first_valid(self, entries: list[tuple[int, int, Path]]) -> Loaded | None:
        skipped: list[Skipped] = []
        for _, _, path in entries:
            try:
                return replace(_verified(path), skipped=tuple(skipped))
            except ArtifactError as error:
                skipped.append(Skipped(path, error.message))
        if skipped:
            raise ArtifactError(
                "\n  ".join([f"no checkpoint in {self.folder} can be used:", *map(str, skipped)]),
                hint="start the run anew, or bring the files back",
            )
        return None

    def _prune(self) -> None:
        """Delete what is neither new nor best. A folder loses its name first, so half of one is never taken for a whole."""
        newest = sorted(self._all(), reverse=True)
        stay = {path for _, _, path in (*newest[: self.keep], *self._by_score()[:1])}
        for _, _, path in newest:
            if path not in stay:
                path.rename(self.folder / f".old-{path.name}")
        self._sweep()

    def _sweep(self) -> None:
        """Remove what earlier writers left behind when they were stopped."""
        for path in self.folder.iterdir():
            if path.name.startswith((".step-", ".old-")):
                shutil.rmtree(path, ignore_errors=True)


def open_checkpoint(path: Path) -> Loaded:
    """Read one checkpoint folder.

    Raises:
        ArtifactError: a file of it is missing, cut, changed, or not of this format.
    """
    try:
        return _verified(path)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error.message}", hint="use another checkpoint of the run") from None


def _verified(path: Path) -> Loaded:
    """As `open_checkpoint`; the error says what is wrong and leaves the path to the caller."""
    manifest = _manifest(path)
    for name in (TENSORS, STATE):
        wanted = manifest["files"][name]
        try:
            size, digest = (path / name).stat().st_size, sha256(path / name)
        except OSError as error:
            raise ArtifactError(f"{name} cannot be read: {error.strerror}") from None
        if size != wanted["bytes"]:
            raise ArtifactError(f"{name} has {size:,} bytes instead of {wanted['bytes']:,}")
        if digest != wanted["sha256"]:
            raise ArtifactError(f"{name} is not what was written: its SHA-256 differs")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors, state = load_file(path / TENSORS), json.loads((path / STATE).read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"it cannot be read: {error}") from None
    return Loaded(manifest["step"], tensors, state, path, manifest["score"], manifest["metrics_bytes"])


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / MANIFEST).read_bytes())
    except OSError as error:
        raise ArtifactError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ArtifactError(f"{MANIFEST} is no JSON") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        written = found.get("schema") if isinstance(found, dict) else None
        raise ArtifactError(f"{MANIFEST} is of the format {written!r}, not {SCHEMA!r}")
    try:
        whole = all(
            isinstance(found["files"][n]["bytes"], int) and found["files"][n]["sha256"] for n in (TENSORS, STATE)
        )
        whole = whole and isinstance(found["step"], int) and {"score", "metrics_bytes"} <= set(found)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise ArtifactError(f"{MANIFEST} does not say what it should")
    if found.get("sha256") != _own_hash(found):
        raise ArtifactError(f"{MANIFEST} is not what was written: its SHA-256 differs")
    named = _NAME.fullmatch(path.name)
    if named and int(named[1]) != found["step"]:
        raise ArtifactError(f"it is the checkpoint of step {found['step']:,}, in a folder of another name")
    return found


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, its own hash apart."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _score(path: Path) -> float | None:
    try:
        score = _manifest(path)["score"]
    except ArtifactError:
        return None
    return float(score) if isinstance(score, int | float) and math.isfinite(score) else None  # a NaN is no score


def _require_text_keys(state: Any) -> None:
    """JSON would make 0 into "0" and say nothing."""
    if isinstance(state, Mapping):
        if bad := [key for key in state if not isinstance(key, str)]:
            raise TypeError(f"the state of a checkpoint is JSON: its keys are text, not {bad[0]!r}")
        state = list(state.values())
    if isinstance(state, list | tuple):
        for value in state:
            _require_text_keys(value)


def _alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share memory (tied weights do): safetensors stores nothing else."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        held = tensor.detach().cpu().contiguous()
        place = held.untyped_storage().data_ptr()
        if place in seen or held.untyped_storage().nbytes() != held.nbytes:
            held = held.clone()
        seen.add(held.untyped_storage().data_ptr())
        found[name] = held
    return found


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
