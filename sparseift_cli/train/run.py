"""Runs of a recipe, one a seed: directories, provenance, resuming, and the summaries of all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..flop_audit import to_json
from ..recipe.load import Recipe
from ..recipe.write import resolved_yaml
from ..runs.directory import RunDirectory
from ..runs.provenance import session
from .evaluate import LOWER_IS_BETTER
from .loop import Report, train
from .prepare import Prepared, prepare, with_seed
from .processes import Processes, processes
from .signals import listening
from .tensorboard import TensorBoard

Note = Callable[..., None]


def run_seeds(recipe: Recipe, seeds: Sequence[int], root: Path, resume: str | None, report: Report,
              note: Note, *, tensorboard: bool = False) -> list[dict[str, Any]]:  # fmt: skip
    """Train every seed, one after the other; their summaries (empty on all ranks but the first).

    Runs that are done already are read, not repeated.

    `resume`: None begins new runs; `latest` goes on with the newest run of each seed where there is one; a folder names
    one run. `report` hears of every line of metrics, `note` of what begins and what was skipped.

    Raises:
        UsageError, CheckFailed: as `prepare`.
        ArtifactError: a run directory that cannot be used, or that was begun with another recipe.
        DivergedError, InterruptedRun: as `train`.
    """
    if resume not in (None, "latest") and len(seeds) > 1:
        raise UsageError("--resume RUN goes on with one run", hint="--resume latest finds the run of every seed")
    if recipe.spec.training.threads is not None:
        torch.set_num_threads(recipe.spec.training.threads)
    if recipe.spec.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on a GPU
        torch.use_deterministic_algorithms(True)
    results = []
    with processes(recipe.spec.training.device) as ours, listening():
        for seed in seeds:
            results.append(_one(with_seed(recipe, seed), seed, root, resume, report, note, ours, tensorboard))
    return results


def _one(recipe: Recipe, seed: int, root: Path, resume: str | None, report: Report, note: Note,
         ours: Processes, tensorboard: bool) -> dict[str, Any]:  # fmt: skip
    text = resolved_yaml(recipe.spec)
    found = _existing(recipe, text, root, resume) if ours.first else None
    if found is not None:
        found.require_recipe(text)
        done = found.summary
        if done is not None:
            note(f"{found.path} is done")
    if ours.agree(ours.first and found is not None and found.summary is not None):
        return dict(found.summary or {}) if found is not None else {}
    run = prepare(recipe, seed, ours)
    if ours.first and found is None:
        plan = run.transformation.plan.to_json() if run.transformation else None
        found = RunDirectory.create(root, recipe.name, text, plan=plan, audit=to_json(run.audit), **_keeping(run))
    path = Path(ours.from_first(str(found.path) if found else ""))
    folder = RunDirectory.open(path, **_keeping(run))
    if not ours.first:
        train(run, folder, ours, report)
        return {}  # rank 0 speaks for all
    with folder.lock():
        newest = folder.checkpoints.newest()
        begins = newest.step if newest else 0
        for skipped in newest.skipped if newest else ():
            note(f"passed over checkpoint {skipped}")
        facts = session(device=str(ours.device), seed=seed, data={run.dataset.name: run.dataset.sha256}, step=begins,
                        processes=ours.world)  # fmt: skip
        for difference in folder.begin(facts):
            note(f"not as before, so bits may differ: {difference}")
        where = f"from step {begins:,}" if begins else "from the start"
        note(f"{path} (seed {seed}, {run.steps:,} steps, {ours.device}): {where}", run.steps)
        board = TensorBoard(path) if tensorboard else None

        def tell(row: Mapping[str, Any]) -> None:
            report(row)
            if board is not None:
                board(row)

        summary = train(run, folder, ours, tell)
        summary["path"] = str(path)
        folder.finish(summary)
    return summary


def _existing(recipe: Recipe, text: str, root: Path, resume: str | None) -> RunDirectory | None:
    if resume is None:
        return None
    if resume == "latest":
        found = RunDirectory.latest(root, recipe.name, recipe=text)
        # another seed's run is no run of this one: begin it; the same seed with another recipe is told as a difference
        return found if found is not None and _seed_of(found) == _seed_line(text) else None
    return RunDirectory.open(Path(resume))


def _seed_of(run: RunDirectory) -> str | None:
    return _seed_line(run.recipe)


def _seed_line(text: str) -> str | None:
    return next((line.strip() for line in text.splitlines() if line.strip().startswith("seed:")), None)


def _keeping(run: Prepared) -> Mapping[str, Any]:
    metric = run.spec.checkpoint.best or run.spec.evaluation.metrics[0]
    return {"keep": run.spec.checkpoint.keep, "better": "lowest" if metric in LOWER_IS_BETTER else "highest"}
