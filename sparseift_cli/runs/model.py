"""The trained module of a run: how it is built is kept beside the recipe, its tensors are in the checkpoints.

    model.json            which dense model, and what was done to it (a `Transformation`); null of a dense run
    buffers.safetensors   buffers that no state dict holds; only where there are some

So neither data nor the checkpoint that a run started at is needed to build it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ..base import atomic
from ..base.metrics import METRICS
from ..base.registry import imports_nothing_for
from ..errors import ArtifactError, UsageError
from ..models.request import Request
from ..transforms.edits import Surgery
from ..transforms.restore import (
    attach_masks,
    build_dense,
    read_tensors,
    set_buffers,
    set_weights,
    unsaved_buffers,
)
from ..transforms.surgery import apply_surgery
from ..transforms.transformation import Transformation, record
from .checkpoint import TENSORS, Checkpoints, Loaded
from .directory import CHECKPOINTS, MODEL, MODEL_SCHEMA, RECIPE, RunDirectory, dense_request, model_facts

if TYPE_CHECKING:
    from ..recipe.load import Recipe

BUFFERS = "buffers.safetensors"
_WEIGHTS, _MASKS = "model/", "masks/"  # how `train.state` names them in a checkpoint


@dataclass(frozen=True, slots=True)
class Trained:
    """The module of a run, as it was at a checkpoint, in eval mode on the CPU."""

    model: nn.Module
    request: Request
    """The dense model that it was made from."""
    recipe: Recipe
    checkpoint: Loaded
    best: bool
    """Whether it is the best checkpoint by the run's metric; otherwise the newest, or one that was asked for."""

    @property
    def facts(self) -> dict[str, Any]:
        """Which checkpoint it is, as JSON."""
        metric = primary_metric(self.recipe)
        return {
            "step": self.checkpoint.step,
            "best": self.best,
            "metric": metric,
            "score": self.checkpoint.score,
            "path": str(self.checkpoint.path),
        }


def primary_metric(recipe: Recipe) -> str:
    """The name of the metric that says which checkpoint is best: checkpoint.best, else the first of evaluation.metrics."""
    return recipe.spec.checkpoint.best or recipe.spec.evaluation.metrics[0]


def keep_model(folder: Path, model: nn.Module, request: Request, done: Transformation | None) -> None:
    """Write how the model of a run is built, where it is not there yet.

    Raises:
        ArtifactError: it cannot be written.
    """
    if (folder / MODEL).exists():
        return
    buffers = unsaved_buffers(model, done)
    if buffers:
        from safetensors.torch import save

        atomic.write_file(folder / BUFFERS, save({k: t.detach().cpu().contiguous() for k, t in buffers.items()}))
    values = None if done is None else {k: v for k, v in done.to_values().items() if k != "buffers"}
    atomic.write_json(folder / MODEL, {"schema": MODEL_SCHEMA, "request": request.to_json(), "transformation": values})


def load_trained(path: str | Path, checkpoint: str = "best", *, kernels: str = "auto", trust: bool = False) -> Trained:
    """Build the model of a run and set the tensors of one of its checkpoints.

    Args:
        path: a run directory.
        checkpoint: `best` by the run's metric (the newest, where none was measured), `last`, or a step.
        kernels: what computes layers that are stored in blocks; "masked" makes them dense.
        trust: let the run name code to run, `package.module:Name`.

    Raises:
        ArtifactError: no such run or checkpoint, or it is damaged.
        UsageError: the run names code and is not trusted, or its dense model cannot be built.
    """
    from ..recipe.load import load

    folder = Path(path)
    RunDirectory.open(folder)
    with imports_nothing_for(None if trust else str(path)):
        recipe = load(folder / RECIPE)
        loaded, best = _chosen(folder, recipe, checkpoint)
        request, done = _read(folder)
        model = _built(folder, request, done, loaded, kernels)
    return Trained(model, request, recipe, loaded, best)


def load_dense(path: str | Path, checkpoint: str = "best", *, trust: bool = False) -> Trained:
    """As `load_trained`, of a run that trained a dense model: what a transform starts at.

    Raises:
        UsageError: the run trained a transformed model.
    """
    dense_request(Path(path))
    return load_trained(path, checkpoint, trust=trust)


def _chosen(folder: Path, recipe: Recipe, which: str) -> tuple[Loaded, bool]:
    """The checkpoint that is meant, and whether it is the best."""
    better: Literal["lowest", "highest"] = (
        "lowest" if METRICS.get(primary_metric(recipe)).lower_is_better else "highest"
    )
    kept = Checkpoints(folder / CHECKPOINTS, better=better)
    steps = kept.steps()
    if not steps:
        raise ArtifactError(f"{folder} has no checkpoint", hint="it was not trained to its first one yet")
    if which not in ("best", "last") and not (which.isdecimal() and int(which) in steps):
        at = ", ".join(f"{step}" for step in steps)
        problem = "is no step" if not which.isdecimal() else "is not kept"
        raise UsageError(f"checkpoint {which!r} of {folder} {problem}", hint=f"best, last, or a step: {at}")
    best = kept.best()
    found = best if which == "best" else kept.newest() if which == "last" else kept.at(int(which))
    found = found or kept.newest()
    assert found is not None
    return found, best is not None and best.path == found.path


def _read(folder: Path) -> tuple[Request, Transformation | None]:
    request, values = model_facts(folder)
    try:
        buffers = read_tensors(folder / BUFFERS) if (folder / BUFFERS).exists() else {}
        return request, None if values is None else Transformation.from_values({**values, "buffers": buffers})
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / MODEL}: unexpected content: {error!r}", hint="the run directory is damaged"
        ) from None


def _built(folder: Path, request: Request, done: Transformation | None, loaded: Loaded, kernels: str) -> nn.Module:
    surgery = done.surgery if done else Surgery()
    model = build_dense(request)
    model = apply_surgery(model, surgery) if done else model
    weights, masks = _part(loaded.tensors, _WEIGHTS), _part(loaded.tensors, _MASKS)
    set_weights(model, weights, masks, surgery, kernels, loaded.path / TENSORS)
    attach_masks(model, masks, surgery)
    buffers = done.buffers if done else read_tensors(folder / BUFFERS) if (folder / BUFFERS).exists() else {}
    set_buffers(model, buffers, folder / BUFFERS)
    if done is not None:
        record(model, done)
    return model.eval()


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
