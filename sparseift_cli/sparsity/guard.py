"""What could make zeros move or numbers rot: optimisers that we do not know, gradients that are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..errors import SparseiftError, UsageError

KEEPS_ZEROS = (SGD, Adam, AdamW)
"""A weight whose value, gradient and state are zero stays at zero under these, with momentum, Nesterov and decay."""


class NonFiniteError(SparseiftError):
    """A gradient or weight is NaN or infinite where a mask update needs it (exit 3: the run diverged)."""

    exit_code = 3


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Do masked gradients suffice? Warns, by name, where weights must be masked again after every step.

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
    """Say that the optimiser is about to make a step that no `Sparsifier.step` came before, where there are gradients."""
    if any(p.grad is not None for p in parameters):
        warnings.warn(
            "optimizer.step() without sparsifier.step() before it: gradients are not masked, and pruned weights fill up; "
            f"call {_ORDER}",
            stacklevel=4,  # whoever called the optimiser's step
        )


def require_masked_gradients(weights: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Refuse gradients that are not zero where the factor beside the parameter is.

    Raises:
        UsageError: `Sparsifier.step` came after the optimiser's, and masked what nobody used any more.
    """
    if any(p.grad is not None and bool(p.grad[factor == 0].any()) for p, factor in weights):
        raise UsageError(
            "optimizer.step() was given gradients that no mask was laid on since loss.backward(): "
            "sparsifier.step() comes too late",
            hint=f"call {_ORDER}",
        )


def state_of(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """The optimiser's tensors of a parameter's shape: momentum_buffer, exp_avg, exp_avg_sq and the like."""
    if parameter not in optimizer.state:  # a defaultdict: asking would make an entry
        return []
    values = optimizer.state[parameter].values()
    return [v for v in values if isinstance(v, Tensor) and v.shape == parameter.shape]


def skipped_inside(optimizer: Optimizer) -> bool:
    """Did a GradScaler make this step of a *fused* optimiser do nothing? Others are not called at all."""
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
    """No NaN and no infinity anywhere; reads every tensor once and waits for the device once.

    By 2-norms, which are fast; where one is not finite the largest magnitude tells an overflow of its squares apart.
    """
    some = [t.detach() for t in tensors if t.numel()]
    return not some or _finite_norms(some, 2.0) or _finite_norms(some, torch.inf)


def require_finite(tensors: Mapping[str, Tensor], what: str, step: int) -> None:
    """Raise NonFiniteError, naming the layers, unless all tensors are finite."""
    if all_finite(list(tensors.values())):
        return
    bad = [name for name, t in tensors.items() if not all_finite([t])]
    raise NonFiniteError(
        f"step {step}: {what} of {_listed(bad)} is not finite, so no mask can be updated by it",
        hint="lower the learning rate, clip gradients, or check the input",
    )


@torch.no_grad()
def multiply_(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """tensors[i] *= factors[i], in place and in as few kernels as the device knows how to."""
    if tensors:
        torch._foreach_mul_(list(tensors), list(factors))  # pyright: ignore[reportPrivateImportUsage]


def _finite_norms(tensors: Sequence[Tensor], order: float) -> bool:
    norms = torch._foreach_norm(list(tensors), order)  # pyright: ignore[reportPrivateImportUsage]
    return bool(torch.stack([n.double().to(tensors[0].device) for n in norms]).isfinite().all())


def _listed(names: Iterable[str], most: int = 5) -> str:
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
