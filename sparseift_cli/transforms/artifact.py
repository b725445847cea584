"""A transformed model on disk: a folder of safetensors and JSON, written completely or not at all.

    model.safetensors   every parameter and persistent buffer; zeros are stored, but those of layers that store blocks (kernels)
    masks.safetensors   one boolean tensor for each sparse weight, under the weight's name; [R, C] where it is stored in blocks
    buffers.safetensors buffers that no state dict holds; only where there are some
    table.json          the dense model's layer table
    plan.json           the plan: sizes and non-zeros of every layer
    surgery.json        the edits that turn the dense module into the planned one
    audit.json          the FLOP audit, as `sparseift flops --json` prints it
    provenance.json     versions, source, seed and options

Reading table, plan and audit needs no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.atomic import as_json, replace_folder, temporary_folder
from ..errors import ArtifactError
from ..plan.audit import Audit, audit
from ..plan.plan import make_plan
from ..plan.spec import TrainingSpec, TransformSpec
from ..table.table import LayerTable
from ..version import __version__

SCHEMA = "sparseift.model/1"
WEIGHTS, MASKS, BUFFERS = "model.safetensors", "masks.safetensors", "buffers.safetensors"


@dataclass(frozen=True)
class Artifact:
    """A folder that `sparseift transform` wrote: its path, and the content of its JSON."""

    path: Path
    table: LayerTable
    spec: TransformSpec
    training: TrainingSpec
    causal: str
    sizes: tuple[int, ...]
    plan: Mapping[str, Any]
    surgery: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def weights(self) -> Path:
        """Path of the weights file; there is none where only the plan was written."""
        return self.path / WEIGHTS

    def audit(self, training: TrainingSpec | None = None, causal: str | None = None) -> Audit:
        """The FLOP audit, counted again from the table and compared with the stored plan.

        Args:
            training, causal: how FLOPs are counted; None means what is stored in the folder.

        Raises:
            ArtifactError: the plan made by this version differs from the stored one.
            UsageError: these training options do not fit the plan.
        """
        plan = make_plan(self.table, self.spec, self.training, causal=self.causal, sizes=self.sizes)
        if plan.to_json()["layers"] != [_with_pattern(row, self.spec.pattern) for row in self.plan["layers"]]:
            raise ArtifactError(
                f"{self.path} was planned by sparseift {self.provenance.get('sparseift')}, which counts "
                "otherwise than this version",
                hint="transform the model again",
            )
        return audit(plan, training, causal=causal)


def _with_pattern(row: Mapping[str, Any], pattern: str) -> Mapping[str, Any]:
    """A row of a stored plan with its pattern, which older versions kept in the spec alone."""
    return {"pattern": pattern, **row} if row["status"] == "transformed" else row


def is_artifact(path: str | Path) -> bool:
    """Is this a folder that `sparseift transform` wrote? False for a run directory, which has a plan and a recipe."""
    folder = Path(path)
    try:
        complete = all((folder / name).is_file() for name in ("provenance.json", "plan.json"))
        return complete and not is_run(folder)
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
        ArtifactError: a file is missing or damaged, or has a format that this version does not read.
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
            tuple(int(size) for size in parts["plan"]["sizes"]),
            parts["plan"],
            parts["surgery"],
            parts["provenance"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder}: unexpected content in its JSON: {error!r}", hint="transform the model again"
        ) from None


def require_writable(path: str | Path, *, force: bool = False) -> Path:
    """Check that `path` is free, an empty folder, or (with `force`) a transformed model; commands call it before the work.

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
    """Write a folder in one step: to a temporary folder beside `path`, which is then renamed.

    A reader sees the old state or the new one. An existing transformed model is replaced only with `force`; anything
    else that exists is never replaced.

    Args:
        documents: content of JSON files, by name without the suffix.
        tensors: content of safetensors files, by file name.
        state_dict: also written as `state_dict.pt`, as torch.save writes it.

    Raises:
        ArtifactError: `path` exists, or cannot be written.
    """
    folder = require_writable(path, force=force)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder) as temporary:
            for name, document in documents.items():
                (temporary / f"{name}.json").write_bytes(as_json(document))
            for name, content in tensors.items():
                _save_tensors(temporary / name, content)
            if state_dict is not None:
                from .export import save_state_dict

                save_state_dict(state_dict, temporary / "state_dict.pt")
            temporary.chmod(0o755)
            replace_folder(folder, temporary)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {folder}: {error.strerror or error}", hint="give -o a writable place"
        ) from None
    return folder


def provenance(**facts: Any) -> dict[str, Any]:
    """The content of provenance.json: versions of the software, and `facts`."""
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
    path.chmod(0o644)  # safetensors makes it readable for the owner only


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
        raise ArtifactError(f"{path} contains {type(data).__name__}, not an object", hint="transform the model again")
    return data
