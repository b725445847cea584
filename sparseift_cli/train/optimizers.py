"""The optimiser and the learning rate of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from ..recipe.durations import in_steps

if TYPE_CHECKING:
    from ..recipe.schema import Spec

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def make_optimizer(model: nn.Module, spec: Spec, device: torch.device) -> Optimizer:
    """SGD or AdamW over every parameter that trains; those named by `no_decay_on` in a group without weight decay."""
    settings = spec.optimizer
    spared = set(_without_decay(model, settings.no_decay_on))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p not in spared]},
        {"params": [p for p in trained if p in spared], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    fused = settings.fused and device.type in ("cpu", "cuda") and all(p.is_floating_point() for p in trained)
    if settings.name == "sgd":
        return SGD(
            groups,
            settings.lr,
            settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
            fused=fused,
        )
    return AdamW(
        groups,
        settings.lr,
        settings.betas,
        settings.eps,
        settings.weight_decay,
        fused=fused,
        capturable=fused and device.type == "cuda",
    )


def _without_decay(model: nn.Module, kinds: tuple[str, ...]) -> Iterator[nn.Parameter]:
    for module in model.modules():
        norm = isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if ("norm" in kinds and norm) or ("bias" in kinds and "bias" in name):
                yield parameter


def learning_rate(spec: Spec, steps: int, epoch_steps: int) -> Callable[[int], float]:
    """Step (from 0) -> learning rate: a linear warm-up to the peak, then the schedule, over the whole run."""
    peak, schedule = spec.optimizer.lr, spec.schedule

    def at(duration: float | str) -> int:
        return in_steps(duration, run_steps=steps, epoch_steps=epoch_steps, unit=spec.training.unit)

    warmup = at(schedule.warmup)
    after = _after_warmup(schedule, peak, warmup, steps, at)
    return lambda step: peak * (step + 1) / warmup if step < warmup else after(step)


def _after_warmup(
    schedule: Any, peak: float, warmup: int, steps: int, at: Callable[[Any], int]
) -> Callable[[int], float]:
    if schedule.name == "multistep":
        milestones = [at(m) for m in schedule.milestones]
        return lambda step: peak * schedule.gamma ** sum(step >= m for m in milestones)
    if schedule.name == "constant":
        return lambda step: peak
    last = schedule.final_lr

    def progress(step: int) -> float:
        return (step - warmup) / max(1, steps - warmup)

    if schedule.name == "cosine":
        return lambda step: last + (peak - last) * (1 + math.cos(math.pi * progress(step))) / 2
    return lambda step: peak + (last - peak) * progress(step)
