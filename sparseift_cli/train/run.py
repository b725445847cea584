"""Runs of a recipe, one a seed: directories, provenance, resuming, and the summaries of all of them."""

from __future__ import annotations

import gc
import importlib
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..base.metrics import LOSS, METRICS
from ..data.places import announcing
from ..errors import ArtifactError, InterruptedRun, SparseiftError, UsageError
from ..kernels.registry import in_words
from ..models.source import source_hash
from ..plan.audit import to_json
from ..recipe.load import Recipe, load, name_of
from ..recipe.write import resolved_yaml
from ..runs.directory import RunDirectory
from ..runs.model import keep_model
from ..runs.provenance import session
from .loop import Report, train
from .parallel import FailedRuns, Failure, require_one_run
from .prepare import Prepared, prepare, with_seed
from .processes import ALONE, Processes, Slot, catching_signals, processes, stop_requested

Note = Callable[..., None]
"""`note(text)`; where a run begins `note(text, steps, first_step, label)`."""
Tick = Callable[[int], None]
Job = tuple[Recipe, int]
"""A recipe, and the seed of one run of it."""


REPEATED = 0.05
"""The share of a held-out split from which on samples that are training samples too are said: CIFAR has a few."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What the runs of one call share: their folder, and the callbacks for their progress."""

    root: Path
    resume: str | None
    report: Report
    note: Note
    tick: Tick | None
    tensorboard: bool
    keep_going: bool


def run_seeds(
    recipe: Recipe,
    seeds: Sequence[int],
    root: Path,
    resume: str | None,
    report: Report,
    note: Note,
    *,
    tensorboard: bool = False,
) -> list[dict[str, Any]]:
    """Train every seed of one recipe, as `run_jobs` does."""
    return run_jobs([(recipe, seed) for seed in seeds], root, resume, report, note, tensorboard=tensorboard)


def run_jobs(
    jobs: Sequence[Job],
    root: Path,
    resume: str | None,
    report: Report,
    note: Note,
    *,
    tick: Tick | None = None,
    tensorboard: bool = False,
    slot: Slot = ALONE,
    keep_going: bool = False,
) -> list[dict[str, Any]]:
    """Train one after the other; the summaries (empty on all ranks but the first).

    Runs that are done already are read, not repeated.

    `resume`: None begins new runs; `latest` continues with the newest run of each recipe and seed where there is one; a
    folder names one run. `report` is called with every line of metrics, `note` with
    what begins and what was skipped, `tick` after every step. `slot`: the place of this process among those of
    `train --parallel`. `keep_going`: a run that fails does not stop those after it (but it does where several processes
    share a run: they could not agree on which run is next).

    Raises:
        UsageError, CheckFailed: as `prepare`.
        ArtifactError: a run directory that cannot be used, or that was begun with another recipe.
        DivergedError: as `train`.
        InterruptedRun: as `train`; or a signal came before a run was begun.
        FailedRuns: with `keep_going`, what failed, after all others are done.
    """
    require_one_run(resume, len(jobs))
    call, results = _Call(root, resume, report, note, tick, tensorboard, keep_going), []
    failures: list[Failure] = []
    with catching_signals():
        for device, group in groupby(jobs, key=lambda job: job[0].spec.training.device):
            with processes(device, slot) as ours:
                before: Recipe | None = None
                for recipe, seed in group:
                    _stop_here(ours, recipe, seed)
                    _free(ours.device, compiled=before not in (None, recipe) and bool(recipe.spec.training.compile))
                    before = recipe
                    with settings_of(recipe):
                        done = _one_or_failure(recipe, seed, call, ours)
                    (failures if isinstance(done, Failure) else results).append(done)
                _free(ours.device, compiled=False)  # while the device is there, not at the interpreter's end
    if failures:
        raise FailedRuns(failures, results, len(jobs))
    return results


def _one_or_failure(recipe: Recipe, seed: int, call: _Call, ours: Processes) -> Any:
    """The summary of one run; where the others should go on, why it failed."""
    label = f"{recipe.name} seed {seed}"
    try:
        return _one(with_seed(recipe, seed), seed, call, ours)
    except InterruptedRun:
        raise
    except SparseiftError as error:
        if not call.keep_going or ours.world > 1:
            raise
        failure = Failure.of(error, label, recipe.name, seed)
    except Exception as error:  # a GPU without room for this run may have room for the next one
        if not call.keep_going or ours.world > 1:
            raise
        call.note(traceback.format_exc().rstrip())
        failure = Failure(label, recipe.name, seed, f"{type(error).__name__}: {error}", None, 1)
    call.note(f"{label} failed, exit code {failure.exit_code}; the others go on")
    return failure


@contextmanager
def settings_of(recipe: Recipe) -> Iterator[None]:
    """What a recipe sets for the whole process, undone for the next recipe: CPU threads, deterministic kernels."""
    threads, deterministic = recipe.spec.training.threads, recipe.spec.training.deterministic
    before, searches = torch.get_num_threads(), torch.backends.cudnn.benchmark  # a graphed step turns the search on
    if threads is not None:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on a GPU
        torch.backends.cudnn.benchmark = (
            False  # a caller may have turned the search on, and which kernel it finds varies
        )
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = searches
        if threads is not None:
            torch.set_num_threads(before)
        if deterministic:
            torch.use_deterministic_algorithms(False)


def _stop_here(ours: Processes, recipe: Recipe, seed: int) -> None:
    """Begin nothing that a signal would stop after its first step.

    Raises:
        InterruptedRun: a signal came.
    """
    if stopping := stop_requested(ours):
        raise InterruptedRun(f"stopped before {recipe.name} seed {seed} was begun; runs before it are done", stopping)


def _free(device: torch.device, *, compiled: bool) -> None:
    """Free what the run before still holds: its model and graphs are in cycles, which only the collector finds.

    `compiled`: forget compiled code too. torch.compile keeps eight versions of a function, and then compiles no more: seeds
    of a recipe share one, but the ninth recipe of a call would run uncompiled.
    """
    if compiled:
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.init()  # before the first run CUDA is not initialised
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _one(recipe: Recipe, seed: int, call: _Call, ours: Processes) -> dict[str, Any]:
    text = resolved_yaml(recipe.spec)
    found = _existing(recipe, text, call) if ours.first else None
    if found is not None:
        try:
            found.require_recipe(text, _as_written_today)
        except ArtifactError as error:
            if recipe.point is not None:
                error.hint = "a sweep of another recipe needs a folder of its own: --runs FOLDER"
            raise
        done = found.summary
        if done is not None:
            call.note(f"{found.path} is done")
    if ours.agree(ours.first and found is not None and found.summary is not None):
        return {**(found.summary or {}), "path": str(found.path)} if found is not None else {}  # it may have been moved
    with announcing(call.note if ours.first else None):
        run = prepare(recipe, seed, ours)
    try:
        _stop_here(ours, recipe, seed)
        return _train(run, found, text, call, ours)
    finally:
        run.close()


def _train(run: Prepared, found: RunDirectory | None, text: str, call: _Call, ours: Processes) -> dict[str, Any]:
    recipe, seed, note = run.recipe, run.seed, call.note
    if ours.first and found is None:
        if call.resume == "latest" and recipe.point is None:
            note(f"nothing of {recipe.name} seed {seed} to continue with in {call.root}: from the start")
        plan = run.transformation.plan.to_json() if run.transformation else None
        found = RunDirectory.create(call.root, recipe.name, text, plan=plan, audit=to_json(run.audit), **_keeping(run))
    path = Path(ours.from_first(str(found.path) if found else ""))
    folder = RunDirectory.open(path, **_keeping(run))
    if not ours.first:
        train(run, folder, ours, call.report)
        return {}  # rank 0 returns the summary
    with folder.lock():
        keep_model(path, run.model, run.request, run.transformation)
        newest = folder.checkpoints.newest()
        begins = newest.step if newest else 0
        for skipped in newest.skipped if newest else ():
            note(f"passed over checkpoint {skipped}")
        name = folder.name or recipe.name  # of the file that began it: this one may be its own recipe.yaml
        facts = session(
            device=str(ours.device),
            seed=seed,
            data={run.dataset.name: run.dataset.sha256},
            step=begins,
            processes=ours.world,
            at_once=ours.at_once,
            recipe=name,
            source=source_hash(run.spec.model.name),
            metrics={name: METRICS.get(name) for name in (LOSS.name, *run.spec.evaluation.metrics)},
            held_out=_held_out(run, note),
            kernels=run.kernels,
            sweep={"recipe": name_of(recipe.path), "axes": dict(recipe.point.values)} if recipe.point else None,
        )
        for difference in folder.begin(facts):
            note(f"not as before, so bits may differ: {difference}")
        label = f"{recipe.name} seed {seed}" if recipe.point else f"seed {seed}"
        where = f"from step {begins:,}" if begins else "from the start"
        note(f"{path} (seed {seed}, {run.steps:,} steps, {ours.device}): {where}", run.steps, begins, label)
        for text in (*([f"kernels: {in_words(run.kernels)}"] if run.kernels else []), *run.notes):
            note(text)
        board = TensorBoard(path) if call.tensorboard else None

        def write_row(row: Mapping[str, Any]) -> None:
            call.report(row)
            if board is not None:
                board(row)

        summary = train(run, folder, ours, write_row, tick=call.tick)
        summary |= {"recipe": name, "path": str(path)}
        folder.finish(summary)
    return summary


def _held_out(run: Prepared, note: Note) -> dict[str, Any]:
    """What is measured on, for provenance; and said where it is not what the files name, or not apart from training."""
    dataset = run.dataset
    if dataset.drawn_from_training:
        note(f"held out to measure on: {dataset.drawn_from_training}")
    repeated: dict[str, int] = {}
    for batches in (run.held_out, run.test):
        if batches is None or not (again := dataset.repeats(batches.split)):
            continue
        repeated[batches.split], size = again, dataset.splits[batches.split]
        if again >= REPEATED * size:
            what = "images" if dataset.kind == "image" else "tokens"
            note(
                f"warning: {again:,} of {size:,} {what} of the split {batches.split} of {dataset.name} are in the training "
                "split too: what is measured on them says little about new data"
            )
    return {
        "split": run.held_out.split,
        "drawn_from_training": dataset.drawn_from_training or None,
        "repeated": repeated,
    }


def _existing(recipe: Recipe, text: str, call: _Call) -> RunDirectory | None:
    if call.resume == "latest":
        return RunDirectory.latest(call.root, recipe.name, recipe=text, read=_as_written_today)
    return None if call.resume is None else RunDirectory.open(Path(call.resume))


def _as_written_today(path: Path) -> str:
    """The whole text of a run's recipe; its own where this version cannot read it."""
    try:
        return resolved_yaml(load(path).spec)
    except SparseiftError:
        return path.read_text("utf-8")


def _keeping(run: Prepared) -> Mapping[str, Any]:
    better = "lowest" if run.primary_metric.lower_is_better else "highest"
    return {"keep": run.spec.checkpoint.keep, "better": better}


class TensorBoard:
    """Writes the numbers of every line of metrics under `folder/tensorboard`, at the step of the line.

    Raises:
        UsageError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            raise UsageError(
                "--tensorboard needs the package tensorboard",
                hint="pip install tensorboard; metrics.jsonl is written in any case",
            ) from None
        self.writer = module.SummaryWriter(str(folder / "tensorboard"))

    def __call__(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self.writer.add_scalar(name, value, row["step"])
        for weight, numbers in row.get("masks", {}).items():
            for name, value in numbers.items():
                self.writer.add_scalar(f"{name}/{weight}", value, row["step"])
        self.writer.flush()
