"""Loss and metrics of a model on a whole split, every sample or token counted once, on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Batches
from .processes import Processes

TOGETHER = 8  # batches after which several processes agree whether one of them was asked to stop: it costs a wait


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, a mapping or object with `logits`, or the first of several outputs."""
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
    asked: Callable[[], int] = lambda: 0,
) -> dict[str, float] | None:
    """The metrics (and the loss) over epoch 0 of `batches`, in eval mode; the model is in train mode afterwards.

    None where a signal `asked` the run to stop before the end: a large evaluation takes longer than a cluster waits.
    """
    every = 1 if processes.world == 1 else TOGETHER
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # summed loss, hits among 1 and among 5
    ranks = max((int(m[3:]) for m in metrics if m.startswith("top")), default=0)
    for i, (x, y) in enumerate(batches):
        if i % every == 0 and asked():
            model.train()
            return None
        if not len(x):
            continue
        with autocast():
            logits = logits_of(model(x))
        sums[0] += loss_of(logits, y, reduction="sum").double()
        if ranks:
            best = logits.topk(min(ranks, logits.shape[-1]), dim=-1).indices.eq(y[:, None])
            sums[1] += best[:, 0].sum()
            sums[2] += best[:, :5].any(1).sum()
    model.train()
    loss, top1, top5 = processes.sum(sums).tolist()
    targets = batches.targets
    found = {"loss": loss / targets.tokens}
    if "top1" in metrics:
        found["top1"] = 100 * top1 / targets.tokens
    if "top5" in metrics:
        found["top5"] = 100 * top5 / targets.tokens
    if "perplexity" in metrics:
        found["perplexity"] = math.exp(min(loss / (targets.words or targets.tokens), 700.0))
    if "bits_per_byte" in metrics and targets.bytes:
        found["bits_per_byte"] = loss / math.log(2) / targets.bytes
    return found
