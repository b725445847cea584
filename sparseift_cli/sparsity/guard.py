"""What could make inactive weights move or spoil numbers: unknown optimisers, late calls, gradients that are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..base.text import some_of
from ..errors import SparseiftError, UsageError

KEEPS_ZEROS = (SGD, Adam, AdamW)
"""Under these a weight whose value, gradient and state are zero stays exactly zero, with momentum, Nesterov and decay.

Others (Muon, Adamax, SAM, ...) may move it, and subclasses with a step of their own too: there masks are applied again."""


class NonFiniteError(SparseiftError):
    """A gradient or weight is NaN or infinite where a mask update needs it (exit 3: the run diverged)."""

    exit_code = 3


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Whether masked gradients suffice under this optimiser; warns if weights must be masked again after every step.

    Raises:
        UsageError: eps = 0, with which Adam divides zero by zero at every inactive weight.
    """
    if any(group.get("eps") == 0 for group in optimizer.param_groups):
        raise UsageError(
            "the optimiser has eps = 0, which divides 0 by 0 at every inactive weight", hint="eps=1e-8 is usual"
        )
    if any(isinstance(optimizer, known) and type(optimizer).step is known.step for known in KEEPS_ZEROS):
        return True
    warnings.warn(
        f"{type(optimizer).__name__} may move weights whose gradient is zero: weights and state are masked again after "
        "every step",
        stacklevel=4,
    )
    return False


_ORDER = "loss.backward(), sparsifier.step(), optimizer.step()"


def warn_of_order(parameters: Iterable[nn.Parameter]) -> None:
    """Warn that the optimiser is about to make a step without a `Sparsifier.step` before it, if there are gradients."""
    if any(p.grad is not None for p in parameters):
        warnings.warn(
            "optimizer.step() without sparsifier.step() before it: gradients are not masked, and pruned weights fill up; "
            f"call {_ORDER}",
            stacklevel=4,  # the line that calls the optimiser's step
        )


def require_masked_gradients(weights: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Refuse gradients [*shape] that are not zero where the mask, given in floats [*shape] beside the parameter, is.

    Raises:
        UsageError: `Sparsifier.step` was called after the optimiser's step, and masked gradients that were used already.
    """
    if any(p.grad is not None and bool(p.grad[mask == 0].any()) for p, mask in weights):
        raise UsageError(
            "optimizer.step() was given gradients that were not masked since loss.backward(): sparsifier.step() comes too late",
            hint=f"call {_ORDER}",
        )


def state_of(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """The optimiser's tensors [*shape] for a parameter [*shape]: momentum_buffer, exp_avg, exp_avg_sq and the like."""
    if parameter not in optimizer.state:  # a defaultdict: indexing would add an entry
        return []
    values = optimizer.state[parameter].values()
    return [v for v in values if isinstance(v, Tensor) and v.shape == parameter.shape]


def skipped_inside(optimizer: Optimizer) -> bool:
    """Whether a GradScaler made this step of a fused optimiser do nothing. Of other optimisers it does not call `step` at all."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def clear_unwritten(optimizer: Optimizer) -> None:
    """Zero momentum buffers that a skipped first step of fused SGD made but did not write.

    torch 2.13 leaves them uninitialised there and adds to them at the next step; zero gives what a first step should.
    """
    for values in optimizer.state.values():
        buffer = values.get("momentum_buffer")
        if buffer is not None:
            buffer.zero_()


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of any shape hold neither NaN nor infinity; reads each once and waits for the device once.

    By 2-norms, which are fast. If one is not finite, the largest magnitudes decide: the sum of squares may have overflowed.
    """
    some = [t.detach() for t in tensors if t.numel()]
    return not some or _finite_norms(some, 2.0) or _finite_norms(some, torch.inf)


def require_finite(tensors: Mapping[str, Tensor], what: str, step: int) -> None:
    """Raise NonFiniteError, naming the layers, unless all tensors (of any shape, by layer) are finite."""
    if all_finite(list(tensors.values())):
        return
    bad = [name for name, t in tensors.items() if not all_finite([t])]
    raise NonFiniteError(
        f"step {step}: {what} of {some_of(bad)} is not finite, so no mask can be updated by it",
        hint="lower the learning rate, clip gradients, or check the input",
    )


@torch.no_grad()
def multiply_(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """tensors[i] *= factors[i] [*shape of tensors[i]], in place and in as few kernels as the device allows."""
    if tensors:
        torch._foreach_mul_(list(tensors), list(factors))  # pyright: ignore[reportPrivateImportUsage]


def _finite_norms(tensors: Sequence[Tensor], order: float) -> bool:
    norms = torch._foreach_norm(list(tensors), order)  # pyright: ignore[reportPrivateImportUsage]
    return bool(torch.stack([n.double().to(tensors[0].device) for n in norms]).isfinite().all())
