"""A transformed model on disk: weights and masks as safetensors, everything else as JSON, written whole or not at all.

    model.safetensors   every parameter and persistent buffer; zeros are stored
    masks.safetensors   one boolean tensor for each sparse weight, under the weight's name
    buffers.safetensors only where needed: buffers that no state dict holds
    table.json          the dense model's layer table
    plan.json           what was planned, to the non-zero
    surgery.json        the edits that make the dense module the planned one
    audit.json          the FLOP audit, as `sparseift flops --json` prints it
    provenance.json     versions, source, seed and options

Reading table, plan and audit needs no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..plan.audit import Audit, audit, recount
from ..plan.spec import TrainingSpec, TransformSpec
from ..table.table import LayerTable
from ..version import __version__

SCHEMA = "sparseift.model/1"
WEIGHTS, MASKS, BUFFERS = "model.safetensors", "masks.safetensors", "buffers.safetensors"


@dataclass(frozen=True)
class Artifact:
    """A directory that `sparseift transform` wrote, as far as its JSON goes."""

    path: Path
    table: LayerTable
    spec: TransformSpec
    training: TrainingSpec
    causal: str
    plan: Mapping[str, Any]
    surgery: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def weights(self) -> Path:
        """The weights file; it may be absent where only the plan was written."""
        return self.path / WEIGHTS

    def audit(self, training: TrainingSpec | None = None, causal: str | None = None) -> Audit:
        """Count it again from its table, and hold the result to the plan that was written.

        Raises:
            ArtifactError: this version plans other non-zeros than the folder holds.
            UsageError: as `flop_audit.recount`.
        """
        again = audit(self.table, self.spec, self.training, causal=self.causal)
        if again.plan is None or again.plan.to_json()["layers"] != self.plan["layers"]:
            raise ArtifactError(
                f"{self.path} was planned by sparseift {self.provenance.get('sparseift')}, which counts "
                "otherwise than this version",
                hint="transform the model again",
            )
        return recount(again.plan, training, causal or self.causal)


def is_artifact(path: str | Path) -> bool:
    """Is this a directory that `sparseift transform` wrote? A run directory, which has a plan and a recipe, is none."""
    folder = Path(path)
    try:
        written = all((folder / name).is_file() for name in ("provenance.json", "plan.json"))
        return written and not is_run(folder)
    except (OSError, ValueError):
        return False


def is_run(path: str | Path) -> bool:
    """Is this the directory of a training run (`runs.directory`)?"""
    try:
        return (Path(path) / "recipe.yaml").is_file()
    except (OSError, ValueError):
        return False


def open_artifact(path: str | Path) -> Artifact:
    """Read the JSON of a transformed model.

    Raises:
        ArtifactError: a file is missing, damaged or of a version that this one does not read.
    """
    folder = Path(path)
    parts = {name: _read(folder, name) for name in ("table", "plan", "surgery", "provenance")}
    if parts["provenance"].get("schema") != SCHEMA:
        raise ArtifactError(
            f"{folder}: written in the format {parts['provenance'].get('schema')!r}, not {SCHEMA!r}",
            hint="transform the model again with this version",
        )
    try:
        return Artifact(
            folder,
            LayerTable.from_json(parts["table"]),
            TransformSpec.from_json(parts["plan"]["spec"]),
            TrainingSpec.from_json(parts["provenance"]["training"]),
            parts["provenance"]["causal"],
            parts["plan"],
            parts["surgery"],
            parts["provenance"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder}: its JSON does not say what it should: {error!r}", hint="transform the model again"
        ) from None


def require_writable(path: str | Path, *, force: bool = False) -> Path:
    """Refuse before the work, not after it: `path` must be free, an empty folder, or (with `force`) a transformed model.

    Raises:
        ArtifactError: something else is there.
    """
    folder = Path(path)
    if folder.exists() and not (is_artifact(folder) and force) and (not folder.is_dir() or any(folder.iterdir())):
        if is_artifact(folder):
            raise ArtifactError(f"{folder} holds a transformed model already", hint="--force replaces it")
        raise ArtifactError(f"{folder} exists and was not written by sparseift transform", hint="choose another -o")
    return folder


def write(
    path: str | Path,
    documents: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Any]],
    *,
    state_dict: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write `documents` (by name, as JSON) and `tensors` (by file name, as safetensors) as one directory, in one step.

    Everything goes to a temporary directory beside `path`, which is then renamed: a reader sees the old state or the new
    one. An existing artifact is replaced only with `force`; anything else that exists never is.

    Raises:
        ArtifactError: `path` exists, or cannot be written.
    """
    folder = require_writable(path, force=force)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            for name, document in documents.items():
                (temporary / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            for name, held in tensors.items():
                _save_tensors(temporary / name, held)
            if state_dict is not None:
                import torch

                torch.save(state_dict, temporary / "state_dict.pt")
            temporary.chmod(0o755)
            _replace(folder, temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise ArtifactError(
            f"cannot write {folder}: {error.strerror or error}", hint="give -o a writable place"
        ) from None
    return folder


def _replace(folder: Path, new: Path) -> None:
    """Put `new` in the place of `folder`; what stood there is moved aside first, and back if that fails."""
    if not folder.exists():
        os.replace(new, folder)
        return
    aside = new.with_name(f"{new.name}.old")
    os.replace(folder, aside)
    try:
        os.replace(new, folder)
    except BaseException:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def provenance(**facts: Any) -> dict[str, Any]:
    """Who wrote it: versions, and what the caller adds."""
    import torch

    return {
        "schema": SCHEMA,
        "sparseift": __version__,
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        **facts,
    }


def _save_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    path.chmod(0o644)  # it comes readable for the owner alone


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"{path}: {error.strerror}", hint="the directory is incomplete; transform the model again"
        ) from None
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}", hint="transform the model again") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds {type(data).__name__}, not an object", hint="transform the model again")
    return data
