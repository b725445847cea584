"""Two runs side by side: what differs in their recipes, in where they ran, and in what came out; bit for bit where asked.

Bit for bit means every evaluation, and every tensor of the newest checkpoint that both have. Wall time and peak memory depend
on the machine, not on the run, and are left out. Tensors are compared as bytes in their files; each checkpoint is first
checked against its own SHA-256.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.facts import BITS, TensorInfo
from ..errors import ArtifactError, UsageError
from ..runs.checkpoint import MANIFEST, STATE, TENSORS, sha256
from .collect import collect
from .grouping import content, described_content, flat
from .read import Run, number
from .spectral.history import kept_checkpoints, tensors_in

_NOT_METRICS = ("masks",)  # statistics of every weight: a thousand numbers a line
_ALWAYS_DIFFERENT = ("started", "command", "from_step", "device_id")  # of a session, in any two runs
CLOCKS = ("seconds", "peak_bytes")
"""Keys, at any depth, that differ between any two runs, even on one machine."""
_FLOATS = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor that differs between the checkpoints."""

    name: str
    what: str
    elements: int | None = None
    """How many elements differ; None where shape or type differ, or one checkpoint has no such tensor."""
    largest: float | None = None
    """Largest absolute difference of two elements, for floating-point tensors."""


@dataclass(slots=True)
class ExactDiff:
    """What a comparison bit for bit compared, and what differs."""

    evaluations: int = 0
    """Lines of metrics that both runs have."""
    first_difference: str | None = None
    """The first evaluation that differs, in words."""
    checkpoint_step: int | None = None
    """Step of the checkpoint that was compared; None where the runs have no step in common."""
    tensors: int = 0
    differing: list[TensorDifference] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    """Keys of state.json that differ: step, optimiser, history of the masks, FLOPs so far."""
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether something was compared, and nothing differs."""
        nothing = not self.evaluations and self.checkpoint_step is None
        return not (nothing or self.first_difference or self.differing or self.state)


@dataclass(frozen=True, slots=True)
class Change:
    """One key and its value in both runs; None where a run has no such key."""

    key: str
    a: Any
    b: Any

    @property
    def difference(self) -> float | None:
        """b - a of two numbers."""
        a, b = number(self.a), number(self.b)
        return None if a is None or b is None else b - a


@dataclass(frozen=True, slots=True)
class Diff:
    """What differs. Metrics are complete, equal ones too: the last evaluation, and the summary's FLOPs and parameters."""

    a: Run
    b: Run
    recipe: list[Change]
    environment: list[Change]
    metrics: list[Change]
    exact: ExactDiff | None = None

    @property
    def notes(self) -> list[str]:
        """Why the metrics are not to be compared, where they are not."""
        both = [content(run) for run in (self.a, self.b)]
        if None in both or both[0] == both[1]:
            return []
        found = " against ".join(map(described_content, (self.a, self.b)))
        return [f"they read other data ({found}): metrics of different data are not to be compared"]


def diff(a: Path, b: Path, *, bit_for_bit: bool = False) -> Diff:
    """Compare the run in `a` with the one in `b`.

    Raises:
        UsageError: a path is not there, or holds several runs.
        ArtifactError: a run is damaged; with `bit_for_bit` also where a checkpoint is.
    """
    one, other = single(a), single(b)
    return Diff(
        one,
        other,
        _changes(flat(one.recipe), flat(other.recipe)),
        _changes(environment(one), environment(other)),
        _changes(results(one), results(other), equal=True),
        exact(one, other) if bit_for_bit else None,
    )


def single(path: Path) -> Run:
    """The one run in `path`: the run directory itself, or a folder that holds no other.

    Raises:
        UsageError: there is none, or there are several.
        ArtifactError: it is damaged.
    """
    found = collect([path])
    if len(found.runs) == 1:
        return found.runs[0]
    if found.runs:
        shown = "".join(f"\n  {run.path}" for run in found.runs[:10])
        raise UsageError(f"{path} holds {len(found.runs)} runs{shown}", hint="diff compares two: give one of them")
    folder, reason = found.skipped[0]
    if found.damaged:
        raise ArtifactError(f"{folder}: {reason}", hint="diff needs two runs that can be read")
    raise UsageError(f"{folder}: {reason}", hint="give a run directory: runs/<recipe>/<date>-<hash>")


def environment(run: Run) -> dict[str, Any]:
    """Dotted keys of the run's last session: versions, commit, device, threads, data."""
    session = ((run.provenance or {}).get("sessions") or [{}])[-1]
    return flat({k: v for k, v in session.items() if k not in (*_ALWAYS_DIFFERENT, "seed")}) if session else {}


def results(run: Run) -> dict[str, Any]:
    """Numbers of its last evaluation and of its summary."""
    last = {k: v for k, v in run.last.items() if k not in _NOT_METRICS and number(v) is not None}
    summary: Mapping[str, Any] = run.summary or {}
    more = {k: summary.get(k) for k in ("best", "params", "nonzero_params")}
    flops = {f"flops.{k}": v for k, v in (summary.get("flops") or {}).items()}
    return {**last, **{k: v for k, v in (more | flops).items() if number(v) is not None}}


def _changes(a: Mapping[str, Any], b: Mapping[str, Any], *, equal: bool = False) -> list[Change]:
    keys = [k for k in dict.fromkeys([*a, *b]) if equal or repr(a.get(k, KeyError)) != repr(b.get(k, KeyError))]
    return [Change(k, a.get(k), b.get(k)) for k in keys]


def exact(a: Run, b: Run) -> ExactDiff:
    """Compare two runs bit for bit.

    Raises:
        ArtifactError: a checkpoint is not what was written.
    """
    found = ExactDiff()
    _evaluations(a, b, found)
    steps = [{kept.step: kept.path for kept in kept_checkpoints(run.path)} for run in (a, b)]
    common = steps[0].keys() & steps[1].keys()
    if common:
        _checkpoint(steps[0][max(common)], steps[1][max(common)], found)
        found.checkpoint_step = max(common)
    else:
        lacking = [str(run.path) for run, have in zip((a, b), steps, strict=True) if not have]
        why = f"none is kept in {' and '.join(lacking)}" if lacking else "they have no step in common"
        found.notes.append(f"no checkpoint was compared: {why}")
    if not found.evaluations:
        found.notes.append("no evaluation was compared: a run has none")
    return found


def _evaluations(a: Run, b: Run, found: ExactDiff) -> None:
    for one, other in zip(a.metrics, b.metrics, strict=False):
        found.evaluations += 1
        left, right = _without_clocks(one), _without_clocks(other)
        if keys := _differing(left, right):
            key = keys[0]
            found.first_difference = f"step {one.get('step')}: {key} is {left.get(key)!r} and {right.get(key)!r}" + (
                f", and {len(keys) - 1} values more" if len(keys) > 1 else ""
            )
            return
    if len(a.metrics) != len(b.metrics):
        found.first_difference = f"{len(a.metrics)} evaluations and {len(b.metrics)}"


def _checkpoint(a: Path, b: Path, found: ExactDiff) -> None:
    for folder in (a, b):
        _verify(folder)
    states = [_without_clocks(_json(folder / STATE)) for folder in (a, b)]
    found.state = _differing(*states)
    left, right = tensors_in(a / TENSORS), tensors_in(b / TENSORS)
    found.tensors = len(left.keys() | right.keys())
    with _mapped(a / TENSORS) as x, _mapped(b / TENSORS) as y:
        for name in dict.fromkeys([*left, *right]):
            if difference := _tensor(name, left.get(name), right.get(name), x, y):
                found.differing.append(difference)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _tensor(
    name: str, a: TensorInfo | None, b: TensorInfo | None, x: mmap.mmap, y: mmap.mmap
) -> TensorDifference | None:
    if a is None or b is None:
        return TensorDifference(name, f"only {'B' if a is None else 'A'} has it")
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return TensorDifference(name, f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}")
    one, other = (memoryview(m)[t.storage.offset : t.storage.offset + t.nbytes] for m, t in ((x, a), (y, b)))
    try:
        return None if one == other else _measure(name, a.dtype, one, other)
    finally:
        one.release()
        other.release()


def _measure(name: str, dtype: str, one: memoryview, other: memoryview) -> TensorDifference:
    import numpy as np

    size = BITS[dtype] // 8
    if not size:
        return TensorDifference(name, "its bytes differ")
    left, right = (np.frombuffer(bytes(v), np.uint8).reshape(-1, size) for v in (one, other))
    differing = (left != right).any(axis=1)
    elements = int(differing.sum())
    largest = None
    if dtype in _FLOATS or dtype == "bfloat16":
        values = [_floats(v[differing], dtype) for v in (left, right)]
        with np.errstate(invalid="ignore", over="ignore"):
            largest = float(np.abs(values[0] - values[1]).max())
    return TensorDifference(name, f"{elements:,} of {len(left):,} elements differ", elements, largest)


def _floats(raw: Any, dtype: str) -> Any:
    """Elements as 64-bit floats [n], from their bytes [n, bytes of an element]."""
    import numpy as np

    if dtype == "bfloat16":  # the upper half of a float32
        wide = np.zeros((len(raw), 4), np.uint8)
        wide[:, 2:] = raw
        return wide.view("<f4").astype(np.float64).ravel()
    return np.ascontiguousarray(raw).view(_FLOATS[dtype]).astype(np.float64).ravel()


def _verify(folder: Path) -> None:
    manifest = _json(folder / MANIFEST)
    for name in (TENSORS, STATE):
        wanted = ((manifest.get("files") or {}).get(name) or {}).get("sha256")
        if not (folder / name).is_file() or sha256(folder / name) != wanted:
            raise ArtifactError(
                f"{folder / name} is not what its {MANIFEST} says: its SHA-256 differs",
                hint="the checkpoint is damaged; compare other runs, or without --exact",
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} cannot be read", hint="the checkpoint is damaged; compare without --exact")
    return found


def _without_clocks(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in flat(values).items() if k.rpartition(".")[2] not in CLOCKS}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, compared as JSON: a float keeps all its bits there, and NaN is equal to itself."""
    return [k for k in dict.fromkeys([*a, *b]) if k not in a or k not in b or json.dumps(a[k]) != json.dumps(b[k])]
