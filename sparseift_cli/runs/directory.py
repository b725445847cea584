"""Run directories: `runs/<recipe>/<utc>-<hash8>/`, one for each recipe and seed.

    recipe.yaml       the whole recipe, every value written out; its hash is in the name
    plan.json         what the transform did, to the non-zero
    audit.json        the FLOP audit, as `sparseift flops --json` prints it
    provenance.json   versions, commit, command, device, threads, seed, data hashes; one entry a session
    metrics.jsonl     one line an evaluation
    checkpoints/      see checkpoint.py
    model.json        how its module is built again, see model.py
    summary.json      there when the run is done
    lock, lock.json   held by the process that writes, and who that is

The loop: `RunDirectory.create` (or `latest`, then `require_recipe`), `with run.lock():`, `run.resume()`, then `save` now and
then, `finish` at the end.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..base import atomic
from ..errors import ArtifactError, UsageError
from ..models.request import Request
from . import provenance
from .checkpoint import Checkpoints, Loaded
from .metrics import Metrics

if TYPE_CHECKING:
    from torch import Tensor

RECIPE, PLAN, AUDIT, PROVENANCE = "recipe.yaml", "plan.json", "audit.json", "provenance.json"
METRICS, CHECKPOINTS, SUMMARY, LOCK = "metrics.jsonl", "checkpoints", "summary.json", "lock"
MODEL, MODEL_SCHEMA = "model.json", "sparseift.run_model/1"
_RUN = re.compile(r"(\d{8}T\d{6}Z)-([0-9a-f]{8})(?:\.(\d+))?")
_SEED = re.compile(r"^  seed: (\d+)$", re.MULTILINE)
ReadRecipe = Callable[[Path], str]
_SHOWN = 40  # lines of a recipe's difference


def model_facts(folder: Path) -> tuple[Request, Mapping[str, Any] | None]:
    """The dense model of a run, and what was done to it as `Transformation.from_values` reads it; None: nothing.

    Raises:
        ArtifactError: the run does not say it, or its file is damaged.
    """
    if not (folder / MODEL).exists():
        raise ArtifactError(
            f"{folder} does not say how its model is built: it was begun by an older version",
            hint="a run that is continued with `sparseift train ... --resume` keeps it from then on",
        )
    facts = atomic.read_json(folder / MODEL)
    try:
        if facts["schema"] != MODEL_SCHEMA:
            raise ArtifactError(f"{folder / MODEL} is of the format {facts['schema']!r}, not {MODEL_SCHEMA!r}")
        return Request.from_json(facts["request"]), facts["transformation"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / MODEL}: unexpected content: {error!r}", hint="the run directory is damaged"
        ) from None


def dense_request(folder: Path) -> Request:
    """The model of a run that trained a dense one.

    Raises:
        UsageError: the run trained a transformed model.
        ArtifactError: as `model_facts`.
    """
    request, done = model_facts(folder)
    if done is not None:
        raise UsageError(
            f"{folder} trained a transformed model already",
            hint="give a run of the dense model; sparseift export writes this one for other programs",
        )
    return request


def recipe_hash(text: str) -> str:
    """Eight hexadecimal digits of the whole recipe's text (`recipe.write.resolved_yaml`)."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def seed_of(recipe: str) -> str | None:
    """The seed in the whole recipe's text; None where it has none."""
    found = _SEED.search(recipe)
    return found[1] if found else None


def _what_is_computed(recipe: str) -> list[str]:
    """The lines of a whole recipe's text without those of HOW_IT_RUNS."""
    lines = recipe.splitlines()
    begins = lines.index("training:") if "training:" in lines else len(lines)
    ends = next((i for i in range(begins + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
    return [
        line
        for i, line in enumerate(lines)
        if not (begins < i < ends and line.strip().partition(":")[0] in provenance.HOW_IT_RUNS)
    ]


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """One run on disk."""

    path: Path
    keep: int = 2
    better: Literal["highest", "lowest"] = "highest"

    @staticmethod
    def create(
        root: Path,
        name: str,
        recipe: str,
        *,
        plan: Mapping[str, Any] | None = None,
        audit: Mapping[str, Any] | None = None,
        now: datetime | None = None,
        keep: int = 2,
        better: Literal["highest", "lowest"] = "highest",
    ) -> RunDirectory:
        """Make `root/name/<utc>-<hash8>/` with the recipe (its whole text), the plan and the audit.

        Raises:
            ArtifactError: it cannot be written.
        """
        stamp = f"{(now or datetime.now(UTC)):%Y%m%dT%H%M%SZ}-{recipe_hash(recipe)}"
        with atomic.explain_os_errors("make", root / name / stamp):
            (root / name).mkdir(parents=True, exist_ok=True)
            path = _make_free(root / name, stamp)
        run = RunDirectory(path, keep, better)
        for file, content in ((PLAN, plan), (AUDIT, audit)):
            if content is not None:
                atomic.write_json(path / file, content)
        atomic.write_file(path / RECIPE, recipe.encode())  # the last one: with it the directory is a run
        with atomic.explain_os_errors("make", path):
            atomic.sync_folder(path.parent)
        return run

    @staticmethod
    def open(path: Path, *, keep: int = 2, better: Literal["highest", "lowest"] = "highest") -> RunDirectory:
        """A run that is there.

        Raises:
            ArtifactError: it is no run directory.
        """
        if not (path / RECIPE).is_file():
            raise ArtifactError(
                f"{path} is no run directory: it has no {RECIPE}",
                hint="give a folder of runs/<recipe>/, or --resume latest",
            )
        return RunDirectory(path, keep, better)

    @staticmethod
    def latest(
        root: Path,
        name: str,
        *,
        recipe: str | None = None,
        read: ReadRecipe | None = None,
        keep: int = 2,
        better: Literal["highest", "lowest"] = "highest",
    ) -> RunDirectory | None:
        """The newest run of `name`; None where there is none.

        With `recipe`: the newest of this very recipe, else of one that `require_recipe` accepts, else the newest of the same
        seed (`require_recipe` then tells the difference). Another seed's run is no run of this one. `read` as there.
        """
        every = RunDirectory.all(root, name, keep=keep, better=better)
        if recipe is None:
            return next(reversed(every), None)
        digits, seed = recipe_hash(recipe), seed_of(recipe)
        same = next((run for run in reversed(every) if _hash_in(run.path) == digits), None)
        if same is not None:
            return same
        candidates = [run for run in reversed(every) if seed_of(run.recipe) == seed]
        wanted = _what_is_computed(recipe)
        older = (run for run in candidates if read and _what_is_computed(read(run.path / RECIPE)) == wanted)
        return next(older, next(iter(candidates), None))

    @staticmethod
    def all(
        root: Path, name: str, *, keep: int = 2, better: Literal["highest", "lowest"] = "highest"
    ) -> list[RunDirectory]:
        """Every run of `name`, the oldest first; a directory without its recipe was never begun and is left out."""
        folder = root / name
        paths = sorted((p for p in folder.iterdir() if _RUN.fullmatch(p.name)), key=_age) if folder.is_dir() else []
        return [RunDirectory(path, keep, better) for path in paths if (path / RECIPE).is_file()]

    @property
    def name(self) -> str | None:
        """The recipe's name that it was begun with, whatever file it continues with; None where nothing says it."""
        file = self.path / PROVENANCE
        sessions = atomic.read_json(file)["sessions"] if file.exists() else []
        whole = self.path.resolve()  # versions before wrote the name at the end alone
        above = whole.parent.name if _RUN.fullmatch(whole.name) else None
        return provenance.begun_as(sessions) or above

    @property
    def recipe(self) -> str:
        """The whole recipe's text."""
        with atomic.explain_os_errors("read", self.path / RECIPE):
            return (self.path / RECIPE).read_text(encoding="utf-8")

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path / CHECKPOINTS, keep=self.keep, better=self.better)

    @property
    def summary(self) -> Mapping[str, Any] | None:
        """What `finish` wrote; None while the run is not done."""
        return atomic.read_json(self.path / SUMMARY) if (self.path / SUMMARY).exists() else None

    def require_recipe(self, recipe: str, read: ReadRecipe | None = None) -> None:
        """Refuse to continue with another recipe than the run began with; on what it is computed may differ.

        `read` gives the text of a recipe file as it is written today: a recipe of an older version lacks the keys that have
        come since, and means their defaults.

        Raises:
            ArtifactError: they differ; it shows how.
        """
        if self.recipe == recipe:
            return
        began = self.recipe if read is None else read(self.path / RECIPE)
        began_lines, now_lines = _what_is_computed(began), _what_is_computed(recipe)
        if began_lines == now_lines:
            return
        lines = list(difflib.unified_diff(began_lines, now_lines, "the run's recipe", "this recipe", n=1, lineterm=""))
        more = [f"... and {len(lines) - _SHOWN} lines more"] if len(lines) > _SHOWN else []
        raise ArtifactError(
            "\n  ".join([f"{self.path} was begun with another recipe:", *lines[:_SHOWN], *more]),
            hint="resume it with its own recipe.yaml, or start a new run without --resume",
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing. The operating system frees it when the process ends, however it ends.

        Raises:
            ArtifactError: another process holds it.
        """
        from filelock import FileLock, Timeout

        held = FileLock(self.path / LOCK, timeout=0)
        with atomic.explain_os_errors("lock", self.path):
            try:
                held.acquire()
            except Timeout:  # an OSError too, so it is handled before those
                raise ArtifactError(
                    f"{self.path} is in use{self._holder()}", hint="wait for it, or stop it; nothing was changed"
                ) from None
        try:
            since = datetime.now(UTC).isoformat(timespec="seconds")
            atomic.write_json(self.path / f"{LOCK}.json", {"pid": os.getpid(), "since": since})
            yield
        finally:
            held.release()

    def begin(self, session: Mapping[str, Any]) -> list[str]:
        """Add a session (`provenance.session`) to provenance.json; what differs from the one before, in words."""
        file = self.path / PROVENANCE
        before = atomic.read_json(file)["sessions"] if file.exists() else []
        atomic.write_json(file, {"schema": provenance.SCHEMA, "sessions": [*before, session]})
        return provenance.differences(before[-1], session) if before else []

    def resume(self) -> tuple[Loaded | None, Metrics]:
        """The newest checkpoint that verifies (None: start at step 0), and the metrics cut back to it, open to append.

        Raises:
            ArtifactError: no checkpoint of those that are there verifies, or the metrics are not the ones it knew.
        """
        found = self.checkpoints.newest()
        position = 0 if found is None else found.metrics_bytes
        return found, Metrics(self.path / METRICS, position=position)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        metrics: Metrics,
        *,
        score: float | None = None,
    ) -> Path:
        """Write a checkpoint of tensors [*] and JSON. The lines of `metrics` so far reach the disk first, so a checkpoint never
        refers to lines that are lost.

        Raises:
            ArtifactError: it cannot be written; the checkpoints before are untouched.
        """
        return self.checkpoints.save(step, tensors, state, score=score, metrics_bytes=metrics.sync())

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: the run is done, and resuming it does nothing."""
        atomic.write_json(self.path / SUMMARY, summary)

    def _holder(self) -> str:
        try:
            holder = atomic.read_json(self.path / f"{LOCK}.json")
            return f" by process {holder['pid']} since {holder['since']}"
        except (ArtifactError, KeyError, TypeError):
            return " by another process"


def _make_free(parent: Path, stamp: str) -> Path:
    """A new folder called `stamp`; `stamp.1` where two runs begin in the same second."""
    for again in range(1000):
        path = parent / (f"{stamp}.{again}" if again else stamp)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise ArtifactError(f"{parent / stamp} is taken a thousand times", hint="wait a second")


def _age(path: Path) -> tuple[str, int, str]:
    found = _RUN.fullmatch(path.name)
    assert found is not None
    return found[1], int(found[3] or 0), found[2]


def _hash_in(path: Path) -> str:
    found = _RUN.fullmatch(path.name)
    assert found is not None
    return found[2]
