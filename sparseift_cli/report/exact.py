"""Whether two runs are the same to the bit: every evaluation, and every tensor of the newest checkpoint that both have.

Wall time and peak memory are the machine's, not the run's, and are left out. Tensors are compared as bytes in their files;
each checkpoint is first held to its own SHA-256.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.facts import BITS, TensorInfo
from ..errors import ArtifactError
from ..runs.checkpoint import MANIFEST, STATE, TENSORS, sha256
from ..runs.directory import CHECKPOINTS
from .grouping import flat
from .read import Run
from .tensors import tensors_in

CLOCKS = ("seconds", "peak_bytes")
"""Keys, at any depth, that differ between two runs on one machine."""
_FOLDER = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_FLOATS = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor that is not the same in both checkpoints."""

    name: str
    what: str
    elements: int | None = None
    """Elements that differ, of the same shape and type; None where shape or type differ, or one has no such tensor."""
    largest: float | None = None
    """Largest absolute difference, of floating-point tensors."""


@dataclass(slots=True)
class Exact:
    """What was compared and what differs; equal where nothing does."""

    evaluations: int = 0
    """Lines of metrics that both have."""
    first_difference: str | None = None
    """The first evaluation that differs, in words."""
    checkpoint_step: int | None = None
    """Step of the checkpoint that was compared; None where there is none that both have."""
    tensors: int = 0
    differing: list[TensorDifference] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    """Keys of state.json that differ: step, optimiser, masks' history, FLOPs spent."""
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """No difference, and something was compared."""
        nothing = not self.evaluations and self.checkpoint_step is None
        return not (nothing or self.first_difference or self.differing or self.state)


def exact(a: Run, b: Run) -> Exact:
    """Compare two runs bit for bit.

    Raises:
        ArtifactError: a checkpoint is not what was written.
    """
    found = Exact()
    _evaluations(a, b, found)
    steps = _checkpoints(a.path), _checkpoints(b.path)
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


def _evaluations(a: Run, b: Run, found: Exact) -> None:
    for one, other in zip(a.metrics, b.metrics, strict=False):
        found.evaluations += 1
        left, right = _timeless(one), _timeless(other)
        if keys := _differing(left, right):
            key = keys[0]
            found.first_difference = f"step {one.get('step')}: {key} is {left.get(key)!r} and {right.get(key)!r}" + (
                f", and {len(keys) - 1} values more" if len(keys) > 1 else ""
            )
            return
    if len(a.metrics) != len(b.metrics):
        found.first_difference = f"{len(a.metrics)} evaluations and {len(b.metrics)}"


def _checkpoint(a: Path, b: Path, found: Exact) -> None:
    for folder in (a, b):
        _verify(folder)
    states = [_timeless(_json(folder / STATE)) for folder in (a, b)]
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
    """Rows of bytes, one an element, as 64-bit floats [n]."""
    import numpy as np

    if dtype == "bfloat16":  # the upper half of a float32
        wide = np.zeros((len(raw), 4), np.uint8)
        wide[:, 2:] = raw
        return wide.view("<f4").astype(np.float64).ravel()
    return np.ascontiguousarray(raw).view(_FLOATS[dtype]).astype(np.float64).ravel()


def _checkpoints(run: Path) -> dict[int, Path]:
    """Checkpoints by step; of those that were saved again, the last."""
    folder = run / CHECKPOINTS
    named = [
        (int(m[1]), int(m[2] or 0), p)
        for p in (folder.iterdir() if folder.is_dir() else ())
        if (m := _FOLDER.fullmatch(p.name))
    ]
    return {step: path for step, _, path in sorted(named)}


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


def _timeless(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in flat(values).items() if k.rpartition(".")[2] not in CLOCKS}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ: floats come back from JSON as they were, bit by bit, and NaN is itself."""
    return [k for k in dict.fromkeys([*a, *b]) if k not in a or k not in b or json.dumps(a[k]) != json.dumps(b[k])]
