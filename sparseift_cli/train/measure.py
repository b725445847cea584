"""`sparseift train --evaluate-only RUN`: a checkpoint of a run, measured on data as the run's own evaluations do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.registry import imports_nothing_for
from ..errors import InterruptedRun, UsageError
from ..kernels.registry import MASKED
from ..recipe.load import Recipe, load, require_data
from ..runs.directory import RECIPE
from ..runs.model import Trained, load_trained
from .compatibility import check_compatibility
from .evaluate import evaluate
from .prepare import autocast_of, make_batches, open_recipe_data, sample_length
from .processes import ALONE, Processes, catching_signals, processes, stop_requested
from .run import settings_of

if TYPE_CHECKING:
    from ..data import Batches

SECTIONS = ("data", "evaluation", "training")
"""What `--set` may change: which data, what is measured, and on what device. Model and masks are those of the run."""


def measure_run(
    path: str | Path, checkpoint: str = "best", sets: Sequence[str] = (), *, trust: bool = False
) -> dict[str, Any]:
    """Measure a checkpoint on the held-out split of its recipe's data, and on the test split where evaluation.test says so.

    Nothing is written into the run.

    Args:
        path: a run directory.
        checkpoint: `best`, `last`, or a step.
        sets: `section.key=value`, which win over the run's recipe: data, evaluation and training.
        trust: let the run name code to run.

    Returns:
        The values by metric, what was measured, and `recorded`: what the run itself measured there, None where it did not.
        Empty on all ranks of torchrun but the first.

    Raises:
        ArtifactError: no such run or checkpoint.
        UsageError: data that is not there or does not fit the model, a setting that would change the model.
        InterruptedRun: a signal came.
    """
    for text in sets:
        section = text.partition("=")[0].partition(".")[0].strip()
        if section not in SECTIONS:
            raise UsageError(
                f"--set {text}: the model that is measured is the run's, and {section} would not change it",
                hint=f"--set is for {', '.join(f'{name}.*' for name in SECTIONS)} here",
            )
    trained = load_trained(path, checkpoint, kernels=MASKED, trust=trust)
    with imports_nothing_for(None if trust else str(path)):
        recipe = load(Path(path) / RECIPE, sets)
    require_data(recipe)
    training = recipe.spec.training
    with catching_signals(), processes(training.device, ALONE) as ours, settings_of(recipe):
        as_in_the_run = all(text.startswith("training.") for text in sets)
        return _measured(str(path), trained, recipe, ours, as_in_the_run=as_in_the_run)


def _measured(path: str, trained: Trained, recipe: Recipe, ours: Processes, *, as_in_the_run: bool) -> dict[str, Any]:
    spec = recipe.spec
    dataset = open_recipe_data(spec)
    batches = make_batches(spec, dataset, spec.training.seed, ours)
    _, held_out, test = batches
    try:
        model = trained.model.to(ours.device)
        autocast = partial(autocast_of, spec, ours.device)
        seq, size = sample_length(spec, dataset), spec.evaluation.batch_size or spec.training.batch_size
        check_compatibility(model, spec.model.name, dataset, batch_size=size, seq=seq, autocast=autocast)

        def measured(split: Batches) -> Mapping[str, float]:
            asked: Callable[[], int] = partial(stop_requested, ours)
            found = evaluate(model, split, spec.evaluation.metrics, ours, autocast, asked)
            if found is None:
                raise InterruptedRun(f"stopped while {path} was measured; nothing was written", asked())
            return found

        splits = {split.split: measured(split) for split in (held_out, test) if split is not None}
    finally:
        for split in batches:
            if split is not None:
                split.close()
    if not ours.first:
        return {}
    last: Mapping[str, Any] = trained.checkpoint.state["last"]
    comparable = as_in_the_run and last.get("step") == trained.checkpoint.step
    recorded = {name: last.get(name) for name in splits[held_out.split]} if comparable else None
    return {
        "run": path,
        "checkpoint": trained.facts,
        "data": {dataset.name: dataset.sha256},
        "split": held_out.split,
        "unit": "images" if dataset.kind == "image" else "tokens",
        "count": {split.split: split.targets.tokens for split in (held_out, test) if split is not None},
        "metrics": splits,
        "recorded": recorded,
    }
