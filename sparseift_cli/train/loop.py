"""The training loop. All randomness is a function of (seed, step), so a run can stop after any step and go on from there.

    for step in range(start, steps):
        make_step(step)            forward and backward of every micro-batch, gradients averaged over all processes;
                                   a loss or gradient that is not finite ends the run before a weight changes;
                                   masks on the gradients, clipping, the optimiser, and at a mask update the exchange
        now and then               evaluate and write a line of metrics, write a checkpoint

A signal is noticed after a step, and within an evaluation: the run saves at once, and an evaluation that was not finished is
`due` when the run goes on. So a job that a cluster stops loses no step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from ..base.metrics import LOSS, TEST
from ..base.randomness import generator_for
from ..data import Batches, order
from ..errors import ArtifactError, InterruptedRun
from ..runs.checkpoint import Loaded
from ..runs.directory import RunDirectory
from ..runs.metrics import Metrics
from ..sparsity.guard import all_finite
from ..sparsity.statistics import total
from .evaluate import evaluate
from .graphed import GraphedStep, can_be_graphed
from .prepare import Prepared
from .processes import Processes, stop_requested
from .state import pack, unpack
from .step import EagerStep, diverged

Report = Callable[[Mapping[str, Any]], None]


@dataclass
class Progress:
    """What a run keeps beside its tensors; a checkpoint has all of it."""

    step: int = 0
    due: bool = False
    """The evaluation after `step` has not been made yet."""
    skipped: int = 0  # steps that overflowed in fp16
    seconds: float = 0.0
    best: float | None = None
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the last line of metrics
    last: dict[str, Any] = field(default_factory=dict)


def train(
    run: Prepared, folder: RunDirectory, processes: Processes, report: Report, tick: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Train from the newest checkpoint of `folder` (or from step 0) to the end.

    The held-out split is measured now and then and at the end, the test split (where the recipe wants it) at the end alone.

    Args:
        run: what `prepare` made.
        folder: where rank 0 writes checkpoints and metrics.
        processes: this process among those of torchrun.
        report: called with every line of metrics.
        tick: called after every step with the number of steps made.

    Returns:
        The summary of the run, as summary.json has it.

    Raises:
        DivergedError: a loss, gradient or weight is not finite, or nearly every step overflows in fp16. Weights and checkpoints
            are those before that step.
        InterruptedRun: SIGTERM or SIGINT; a checkpoint was written first.
        ArtifactError: the run directory cannot be read or written.
        CheckFailed: masks differ between ranks.
    """
    loaded, metrics = folder.resume() if processes.first else (folder.checkpoints.newest(), None)
    progress = Progress()
    scaler = GradScaler(processes.device.type, enabled=run.spec.training.precision == "fp16")
    if loaded is not None:
        _require_same_order(run, loaded)
        unpack(loaded, run.model, run.optimizer, run.sparsifier)
        _restore(progress, run, scaler, loaded.state, processes)
    make_step = GraphedStep(run) if can_be_graphed(run, processes) else EagerStep(run, scaler, processes)
    make_step.skipped = progress.skipped
    evaluate_every, save_every = run.every(run.spec.evaluation.every), run.every(run.spec.checkpoint.every)
    began = time.perf_counter() - progress.seconds
    while progress.step < run.steps or progress.due:
        if not progress.due:  # True only where a run goes on that was stopped before an evaluation
            torch.manual_seed(_forward_seed(run.seed, progress.step, processes.rank))
            progress.losses.append(make_step(progress.step))
            run.flop_meter.add(run.sparsifier.last if run.sparsifier else None)
            progress.step += 1
            progress.skipped = make_step.skipped
            if tick is not None:
                tick(progress.step)
            progress.due = progress.step == run.steps or progress.step % evaluate_every == 0
        stopping = stop_requested(processes)
        saving = progress.step == run.steps or progress.step % save_every == 0
        if stopping or progress.due or saving:
            make_step.check()
            progress.seconds = time.perf_counter() - began
        if progress.due:
            processes.share_buffers(run.model)
            if not stopping:
                progress.due = not _measure(run, progress, metrics, processes, report)
                stopping = stop_requested(processes) if progress.due else 0
        if stopping or saving:
            _save(run, progress, folder, metrics, scaler, processes)
        if stopping:
            raise _interrupted(run, progress, folder, stopping)
    return _summary(run, progress)


def _interrupted(run: Prepared, progress: Progress, folder: RunDirectory, signal: int) -> InterruptedRun:
    before = ", before its evaluation" if progress.due else ""
    where = f"stopped after step {progress.step} of {run.steps}{before}"
    return InterruptedRun(f"{where}; the checkpoint is in {folder.path}", signal)


def _measure(run: Prepared, progress: Progress, metrics: Metrics | None, processes: Processes, report: Report) -> bool:
    """Evaluate and write one line of metrics; at the end of a run also on the test split, where the recipe wants it.

    Returns:
        False where a signal came before the evaluation was finished: nothing is written, and `progress` is as before.
    """

    def measured(batches: Batches) -> dict[str, float] | None:
        wanted = run.spec.evaluation.metrics
        return evaluate(run.model, batches, wanted, processes, run.autocast, lambda: stop_requested(processes))

    found = measured(run.held_out)
    if found is None:
        return False
    if run.test is not None and progress.step == run.steps:
        tested = measured(run.test)
        if tested is None:
            return False
        found |= {TEST + name: value for name, value in tested.items()}
    if run.sparsifier is not None:
        run.sparsifier.check_ranks()
    train_loss = (processes.sum(torch.stack(progress.losses)) / processes.world).mean()
    progress.losses.clear()
    row: dict[str, Any] = {
        "step": progress.step,
        "epoch": progress.step / run.train.steps_per_epoch,
        "lr": run.rate(progress.step - 1),
        "train_loss": float(train_loss),
        **found,
        "flops": run.flop_meter.total,
        "executed_flops": run.flop_meter.executed,
        "seconds": round(progress.seconds, 3),
        **_memory(run, processes.device),
    }
    if run.spec.training.precision == "fp16":
        row["skipped_steps"] = progress.skipped
    if run.sparsifier is not None:
        by_weight = run.sparsifier.statistics()
        masks = total(by_weight.values())
        row |= {"density": masks.density, "itop_rate": masks.itop_rate, "churn": masks.churn}
        row["masks"] = {
            name: {"density": w.density, "itop_rate": w.itop_rate, "churn": w.churn} for name, w in by_weight.items()
        }
    progress.last = row
    score = _score(run, row)
    if score is not None and math.isfinite(score) and (progress.best is None or _better(run, score, progress.best)):
        progress.best = score
    if metrics is not None:
        metrics.append(row)
        report(row)
    _require_finite_loss(run, progress.step, found)
    return True


def _require_finite_loss(run: Prepared, step: int, measured: Mapping[str, float]) -> None:
    """Raise DivergedError where a loss on held-out data is no number, though the losses of training are."""
    for name, batches in ((LOSS.name, run.held_out), (TEST + LOSS.name, run.test)):
        if batches is not None and not math.isfinite(loss := measured.get(name, 0.0)):
            left = (
                "checkpoints are those before this evaluation; in fp16 an overflow is a cause: training.precision: bf16"
            )
            raise diverged(step - 1, f"the loss on the split {batches.split} is {loss:g} after it", left)


def _score(run: Prepared, row: Mapping[str, Any]) -> float | None:
    return row.get(run.primary_metric.name)


def _better(run: Prepared, score: float, than: float) -> bool:
    return score < than if run.primary_metric.lower_is_better else score > than


def _save(
    run: Prepared,
    progress: Progress,
    folder: RunDirectory,
    metrics: Metrics | None,
    scaler: GradScaler,
    processes: Processes,
) -> None:
    """A checkpoint. Every rank takes part, as the losses are those of all; rank 0 writes."""
    if not all_finite(list(run.model.parameters())):  # finite gradients, and a step that overflowed all the same
        raise diverged(progress.step - 1, "a weight is not finite after it")
    losses = processes.sum(torch.stack(progress.losses)).tolist() if progress.losses else []
    if metrics is None:
        return
    tensors, state = pack(run.model, run.optimizer, run.sparsifier)
    state |= {
        "step": progress.step,
        "due": progress.due,
        "shuffle": order.VERSION,
        **run.flop_meter.state(),
        "seconds": progress.seconds,
        "best": progress.best,
        "losses": [loss / processes.world for loss in losses],
        "last": progress.last,
        "scaler": scaler.state_dict(),
        "skipped": progress.skipped,
    }
    fresh = progress.last.get("step") == progress.step
    folder.save(progress.step, tensors, state, metrics, score=_score(run, progress.last) if fresh else None)


def _require_same_order(run: Prepared, loaded: Loaded) -> None:
    """Refuse to continue with a run that began when epochs were shuffled by another formula: it would see images twice.

    Token sets draw their windows at random places, which no version changed.

    Raises:
        ArtifactError: the checkpoint is of such a version.
    """
    if run.dataset.kind == "image" and loaded.state.get("shuffle") != order.VERSION:
        raise ArtifactError(
            f"{loaded.path} was written by a version of sparseift that shuffled the training images in another order",
            hint="finish the run with the version that began it, or start a new run without --resume",
        )


def _restore(
    progress: Progress, run: Prepared, scaler: GradScaler, state: Mapping[str, Any], processes: Processes
) -> None:
    progress.step, progress.seconds, progress.best = int(state["step"]), float(state["seconds"]), state["best"]
    device = next(run.model.parameters()).device
    share = processes.world if processes.first else 0  # the mean of all ranks is saved, and their sum comes back
    progress.losses = [torch.tensor(share * loss, device=device) for loss in state["losses"]]
    progress.last = dict(state["last"])
    progress.due = bool(state.get("due", False))  # checkpoints of older versions were all made after the evaluation
    progress.skipped = int(state.get("skipped", 0))
    run.flop_meter.restore(state, progress.step)
    if scaler.is_enabled():
        scaler.load_state_dict(dict(state["scaler"]))


def _summary(run: Prepared, progress: Progress) -> dict[str, Any]:
    audited = run.audit.transformed or run.audit.dense
    return {
        "schema": "sparseift.summary/1",
        "recipe": run.recipe.name,
        "seed": run.seed,
        "steps": run.steps,
        "metrics": progress.last,
        "best": progress.best,
        "flops": {
            "spent": run.flop_meter.total,
            "executed": run.flop_meter.executed,
            "audited": round(2 * audited.training_macs * run.steps * run.spec.training.batch_size),
            "dense": round(2 * run.audit.dense.training_macs * run.steps * run.spec.training.batch_size),
        },
        "params": audited.params,
        "nonzero_params": run.audit.nonzero_after_training,
        "seconds": round(progress.seconds, 3),
    }


def _memory(run: Prepared, device: torch.device) -> dict[str, int]:
    """Bytes: the largest that was held so far (of the process, or of the GPU), and what the optimiser keeps."""
    import resource

    state = run.optimizer.state.values()
    held = sum(t.nbytes for values in state for t in values.values() if isinstance(t, Tensor))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "optimizer_bytes": held}


def _forward_seed(seed: int, step: int, rank: int) -> int:
    """The seed of what is random inside a forward pass (dropout) at a step."""
    return generator_for(seed, "forward", str(step), str(rank)).initial_seed()
