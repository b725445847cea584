"""One optimiser step: backward of every micro-batch, masks, clipping, the update. `graphed` replays the same as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from ..errors import DivergedError
from ..kernels.fuse import sparseift
from ..sparsity.guard import all_finite
from .evaluate import logits_of, loss_of
from .prepare import Prepared
from .processes import Processes

MOST_SKIPPED = 32
"""fp16: steps in a row that may overflow. The scale of the loss begins at 2^16 and halves at each, so by then it is 2^-16."""
Assemble = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Step(Protocol):
    """Makes the steps of a run, one call each, in order."""

    skipped: int
    """Steps so far that changed no weight, because their gradients overflowed in fp16."""

    def __call__(self, step: int) -> Tensor:
        """Make a step; its mean loss on this rank, a scalar on the device that nothing else writes to."""
        ...

    def check(self) -> None:
        """Raise DivergedError where a step so far met a loss or gradient that is no number; may wait for the device."""
        ...


_TRY_BF16 = "training.precision: bf16 or fp32 has a wider range"
_UNTOUCHED = "weights and checkpoints are those before this step"


def diverged(step: int, what: str = "the loss or a gradient is not finite", left: str = _UNTOUCHED) -> DivergedError:
    """What a run ends with: the step, what is wrong with it, and what it leaves."""
    return DivergedError(
        f"step {step}: {what}",
        hint=f"lower optimizer.lr, lengthen schedule.warmup, or set training.clip; {left}",
    )


def compiled(run: Prepared) -> bool:
    """Does the recipe want torch.compile on the device that the run has?"""
    wanted = run.spec.training.compile
    return run.device.type == "cuda" if wanted == "auto" else wanted


class EagerStep:
    """Operation after operation, on any device and any number of processes."""

    def __init__(self, run: Prepared, scaler: GradScaler, processes: Processes) -> None:
        self._run, self._scaler, self._processes = run, scaler, processes
        self.skipped = self._in_a_row = 0
        model = torch.compile(run.model, backend=sparseift) if compiled(run) else run.model
        self._forward: nn.Module = processes.wrap(model)  # pyright: ignore[reportArgumentType]
        if run.sparsifier is not None:
            run.sparsifier.note_wrapper(self._forward)

    def __call__(self, step: int) -> Tensor:
        set_rate(self._run, self._run.rate(step))
        loss = self._backward(step)
        self._update(loss, step)
        return loss

    def check(self) -> None:
        """Every step has looked for itself; but a whole run of skipped ones has trained nothing."""
        steps = self._run.steps
        if self.skipped == steps:
            raise diverged(steps - 1, f"all {steps:,} steps were skipped: their gradients overflow in fp16", _TRY_BF16)

    def _backward(self, step: int) -> Tensor:
        """Gradients of the global batch of `step`, and its mean loss on this rank."""
        run, processes = self._run, self._processes
        x, y = run.train.at(step)
        micro = run.spec.training.accumulate
        mean = torch.zeros((), device=x.device)
        for i, (part, target) in enumerate(zip(x.chunk(micro), y.chunk(micro), strict=True)):
            with processes.without_averaging(self._forward, last=i == micro - 1):
                with run.autocast():
                    logits = logits_of(self._forward(part))
                    loss = loss_of(logits, target, smoothing=run.spec.training.label_smoothing) / micro
                self._scaler.scale(loss).backward()
            mean += loss.detach()
        return mean

    def _update(self, loss: Tensor, step: int) -> None:
        """The optimiser's step, or none: a NaN never reaches a weight."""
        run, scaler = self._run, self._scaler
        gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
        scaler.unscale_(run.optimizer)
        scaled = scaler.is_enabled()  # fp16: an overflow is expected now and then, and the scaler skips its step
        bad = not bool(loss.isfinite()) or (not scaled and not all_finite(gradients))
        if self._processes.agree(bad):
            raise diverged(step, f"the loss is {float(loss):g} and its gradients are not finite")
        overflow = scaled and not all_finite(gradients)
        self._count(overflow, step)
        if run.sparsifier is not None:
            run.sparsifier.step(found_inf=overflow)
        clip(run)
        if (
            not overflow
        ):  # left to the scaler, PyTorch's fused SGD keeps a momentum that it never wrote, and adds it later
            scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad(set_to_none=True)

    def _count(self, overflow: bool, step: int) -> None:
        """Count skipped steps. Those of a healthy run are few: each halves the scale until gradients fit."""
        self.skipped += overflow
        self._in_a_row = self._in_a_row + 1 if overflow else 0
        often = self.skipped >= MOST_SKIPPED and 2 * self.skipped > step + 1
        if self._in_a_row >= MOST_SKIPPED or often:
            found = f"{self.skipped:,} of {step + 1:,} steps were skipped, {self._in_a_row} of them in a row"
            raise diverged(step, f"{found}: their gradients are not finite at any scale in fp16", _TRY_BF16)


def set_rate(run: Prepared, rate: float | Tensor) -> None:
    """Set the learning rate of the next step: a number, or a scalar tensor [] that a CUDA graph reads."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate


def clip(run: Prepared) -> None:
    """Scale the gradient down to the largest norm that the recipe allows."""
    if run.spec.training.clip is not None:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.spec.training.clip)
