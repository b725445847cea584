"""What could make inactive weights move or spoil numbers: calls in the wrong order, gradients that are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..base.text import some_of
from ..errors import SparseiftError, UsageError


class NonFiniteError(SparseiftError):
    """A gradient or weight is NaN or infinite where a mask update needs it (exit 3: the run diverged)."""

    exit_code = 3


_ORDER = "loss.backward(), sparsifier.step(), optimizer.step()"


def warn_of_order(weights: Iterable[tuple[nn.Parameter, Tensor]]) -> bool:
    """Warn, and return True, if the optimiser is about to make a step with gradients that no `Sparsifier.step` masked.

    Args:
        weights: parameters, and the mask of each in floats, [*shape] both.
    """
    unmasked = _have_unmasked(weights)
    if unmasked:
        warnings.warn(
            "optimizer.step() without sparsifier.step() before it: gradients are not masked, so weights are masked after this "
            f"step, and no mask moves; call {_ORDER}",
            stacklevel=4,  # the line that calls the optimiser's step
        )
    return unmasked


def warn_of_masks_left() -> None:
    """Warn if the optimiser is about to make a step without a `Sparsifier.step`, where no gradient needs a mask."""
    warnings.warn(
        f"optimizer.step() without sparsifier.step() before it: no mask moves; call {_ORDER}",
        stacklevel=4,  # as in `warn_of_order`
    )


def _have_unmasked(weights: Iterable[tuple[nn.Parameter, Tensor]]) -> bool:
    """Whether a gradient is not zero where the mask is."""
    return any(p.grad is not None and bool(p.grad[mask == 0].any()) for p, mask in weights)


def require_masked_gradients(weights: Iterable[tuple[nn.Parameter, Tensor]], *, in_closure: bool = False) -> None:
    """Refuse gradients [*shape] that are not zero where the mask, given in floats [*shape] beside the parameter, is.

    Args:
        in_closure: they were made by the closure of the optimiser's step.

    Raises:
        UsageError: `Sparsifier.step` was called after the optimiser's step, and masked gradients that were used already; or
            before it, and the closure made new ones.
    """
    if not _have_unmasked(weights):
        return
    if in_closure:
        raise UsageError(
            "optimizer.step(closure) made gradients that are not masked",
            hint="call sparsifier.step() in the closure, after loss.backward(); it counts once a step",
        )
    raise UsageError(
        "optimizer.step() was given gradients that were not masked since loss.backward(): sparsifier.step() comes too late",
        hint=f"call {_ORDER}",
    )


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
