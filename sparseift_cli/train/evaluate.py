"""Loss and metrics of a model on a whole split, every sample or token counted once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.metrics import LOSS, METRICS
from ..data import Batches
from .processes import Processes

TOGETHER = 8  # batches after which several processes agree whether one of them was asked to stop: it costs a wait


def logits_of(output: Any) -> Tensor:
    """The logits [B, C] or [B, T, C] of a model: its output, the `logits` of it, or the first of several outputs."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output["logits"]
    found = getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else logits_of(output[0])


def loss_of(logits: Tensor, target: Tensor, *, smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Cross-entropy of [B, C] against [B], or of [B, T, C] against [B, T]; targets of -100 do not count."""
    return F.cross_entropy(
        logits.flatten(0, -2).float(), target.flatten(), label_smoothing=smoothing, reduction=reduction
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    metrics: Sequence[str],
    processes: Processes,
    autocast: Callable[[], AbstractContextManager[Any]],
    stop_requested: Callable[[], int] = lambda: 0,
) -> dict[str, float] | None:
    """The metrics (and the loss) over epoch 0 of `batches`, in eval mode; the model is in train mode afterwards.

    None where `stop_requested` was not 0 before the end: a large evaluation takes longer than a cluster waits for a job
    that it stops.
    """
    wanted = [METRICS.get(name) for name in dict.fromkeys([LOSS.name, *metrics])]
    wanted = [metric for metric in wanted if batches.dataset.kind in metric.kinds]
    totals = list(dict.fromkeys(metric.total for metric in wanted))
    every = 1 if processes.world == 1 else TOGETHER
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(len(totals), dtype=torch.float64, device=device)
    for i, (x, y) in enumerate(batches):
        if i % every == 0 and stop_requested():
            model.train()
            return None
        if not len(x):
            continue
        with autocast():
            logits = logits_of(model(x)).flatten(0, -2)  # [N, C]
        for index, total in enumerate(totals):
            sums[index] += total(logits, y.flatten())
    model.train()
    found = dict(zip(totals, processes.sum(sums).tolist(), strict=True))
    values = {metric.name: metric.value(found[metric.total], batches.targets) for metric in wanted}
    return {name: value for name, value in values.items() if value is not None}
