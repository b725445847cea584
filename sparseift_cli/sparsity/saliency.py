"""Which weights matter before training: SNIP, GraSP, and FORCE or iterative SNIP, on a few batches at initialisation.

A score here is large where a weight should be *kept*, for every method. The papers rank the weights of all layers
together, which also decides each layer's density; an iso-FLOP plan has fixed every layer's non-zeros already, so the
ranking is within each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from torch import Tensor, nn

from ..errors import UsageError
from .layout import Block, NofM, parse_pattern, room
from .mask import generator_for, make_mask
from .probe import Probe

LossFn = Callable[[Any, Any], Tensor]


class MaskLayout(TypedDict, total=False):
    """How the mask of one weight is laid out: the arguments of `make_mask` of the same names."""

    pattern: str
    connect: bool
    groups: int
    transposed: bool
    row_balance: int | None
    column_balance: int | None


def scores(
    model: nn.Module,
    keys: Sequence[str],
    batches: Iterable[tuple[Any, Any]],
    loss_fn: LossFn,
    *,
    method: Literal["snip", "grasp"] = "snip",
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores of the parameters named `keys`, float32 on the CPU and in their shapes; the larger, the rather to be kept.

    * snip: |w * dL/dw| (Lee, Ajanthan, Torr, "SNIP: Single-shot network pruning", ICLR 2019, arXiv 1810.02340,
      without its normalisation, which changes no order).
    * grasp: w * Hg, with g = dL/dw and H the Hessian over `keys` (Wang, Zhang, Grosse, "Picking winning tickets before
      training by preserving gradient flow", ICLR 2020, arXiv 2002.07376). The paper's S(-w) = -w * Hg is what removing w
      adds to the gradient's squared norm, to first order and halved, and it removes the largest S; this is -S.

    L is the mean of the loss over the batches, each counted once. The model runs in train mode, as at the first training
    step: batch statistics, but no dropout from modules. It is left exactly as it was (see `Probe`).

    Args:
        batches: (input, target) pairs on the model's device; an input that is a tuple or list is passed as positional
            arguments, a mapping as keyword arguments.
        loss_fn: (output, target) to a scalar.
        masks: zeros to score the network with; scores of masked weights are those of returning (FORCE).
        seed: of what randomness remains in the forward pass.

    Raises:
        UsageError: a name that is no parameter, or two of one; no batches; a loss that is no number, is not finite or
            does not depend on one of the parameters; scores that are not finite. It names the parameter.
    """
    if method not in ("snip", "grasp"):
        raise UsageError(f"unknown saliency {method!r}", hint="use snip or grasp; FORCE needs counts: force_masks")
    probe = Probe(model, keys, loss_fn, seed)
    pairs = list(batches)
    found = probe.gradients(pairs, masks) if method == "snip" else probe.hessian_gradients(pairs, masks)
    result: dict[str, Tensor] = {}
    for key in keys:
        score = probe.weights[key].float() * found[key].float()
        score = (score.abs() if method == "snip" else score).cpu()
        if not bool(score.isfinite().all()):
            bad = int((~score.isfinite()).count_nonzero())
            raise UsageError(
                f"{method}: {bad} of {score.numel()} scores of {key} are not finite",
                hint="is the model initialised, and is the input normalised?",
            )
        result[key] = score
    return result


def force_masks(
    model: nn.Module,
    nnz: Mapping[str, int],
    batches: Iterable[tuple[Any, Any]],
    loss_fn: LossFn,
    *,
    rounds: int = 10,
    regrow: bool = True,
    structure: Mapping[str, MaskLayout] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Masks with exactly nnz[key] non-zeros, pruned in `rounds` steps by the SNIP scores of the network masked so far.

    The number of non-zeros falls exponentially from all weights N to nnz: N ** (1 - t/T) * nnz ** (t/T) after round t of
    T. With `regrow` pruned weights are scored as if they came back, and may (FORCE); without, they stay pruned
    (iterative SNIP). Source: de Jorge, Sanyal, Behl, Torr, Rogez, Dokania, "Progressive skeletonization", ICLR 2021,
    arXiv 2006.09081. One round is SNIP.

    An N:M pattern has one count, so the rounds before the last are unstructured; there a pruned weight returns in
    iterative SNIP too where a group has too few others.

    Args:
        structure: pattern and layout of each key's mask, where it is not that of a plain unstructured weight.
        Others as in `scores`; every round sees all batches.

    Raises:
        UsageError: as `scores` and `make_mask`; fewer than one round.
    """
    if rounds < 1:
        raise UsageError(f"{rounds} rounds of pruning: at least one is needed")
    pairs = list(batches)
    masks: dict[str, Tensor] = {}
    for t in range(1, rounds + 1):
        found = scores(model, list(nnz), pairs, loss_fn, masks=masks, seed=seed)
        previous, masks = masks, {}
        for key, score in found.items():
            form: MaskLayout = (structure or {}).get(key, {})
            if not regrow and key in previous:
                score = score.masked_fill(~previous[key], -1.0)  # below every |w g|
            count, form = _step(tuple(score.shape), nnz[key], t / rounds, form)
            generator = generator_for(seed, key, "force", str(t))
            try:
                masks[key] = make_mask(score.shape, count, generator=generator, scores=score, **form)
            except UsageError as error:
                raise UsageError(f"{key}: {error.message}", hint=error.hint) from None
    return masks


def _step(shape: tuple[int, ...], nnz: int, progress: float, form: MaskLayout) -> tuple[int, MaskLayout]:
    """Non-zeros of a weight at `progress` (1 at the end) of the pruning, and the structure that can have them."""
    if progress == 1 or nnz < 1:
        return nnz, form
    kind = parse_pattern(form.get("pattern", "unstructured"))
    if isinstance(kind, NofM):
        kind, form = Block(1, 1), form.copy()
        form["pattern"] = "unstructured"
    most = room(shape, kind, groups=form.get("groups", 1), transposed=form.get("transposed", False))
    count = round(most ** (1 - progress) * nnz**progress)
    return max(nnz, count // kind.size * kind.size), form
