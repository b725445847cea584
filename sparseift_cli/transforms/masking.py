"""Masks for a transformed module: as many non-zeros as planned, where the spec's pattern, heads and branches put them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from ..errors import CheckFailed
from ..mask import disjoint_masks, empty_rows_and_columns, generator_for, has_pattern, make_mask
from ..plan.plan import Plan
from .edits import Masked, Surgery


def draw_masks(
    model: nn.Module,
    plan: Plan,
    surgery: Surgery,
    *,
    seed: int = 0,
    connect: bool = True,
    scores: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """A boolean mask for every sparse weight: random, or the planned number of highest `scores` (by weight key).

    The branches of Sparse Parallel have independent masks, or disjoint ones where no non-linearity tells them apart
    (`branch_activation: sum`).

    Raises:
        UsageError: the pattern cannot hold the planned counts.
    """
    pattern = plan.spec.pattern
    masks: dict[str, Tensor] = {}
    by_layer: dict[str, list[Masked]] = {}
    for m in surgery.masked:
        by_layer.setdefault(m.layer, []).append(m)
    disjoint = plan.spec.member == "sparse_parallel" and plan.spec.branch_activation == "sum"
    for layer, parts in by_layer.items():
        if disjoint and scores is None:
            (first, *_) = parts
            generator = generator_for(seed, "mask", layer)
            shape = tuple(model.get_parameter(first.key).shape)
            drawn = disjoint_masks(
                shape,
                [m.nnz for m in parts],
                generator=generator,
                pattern=pattern,
                connect=connect,
                groups=first.groups,
                transposed=first.transposed,
            )
            masks |= {m.key: mask for m, mask in zip(parts, drawn, strict=True)}
            continue
        for m in parts:
            weight = model.get_parameter(m.key)
            masks[m.key] = make_mask(
                tuple(weight.shape),
                m.nnz,
                generator=generator_for(seed, "mask", m.layer, m.part),
                pattern=pattern,
                scores=None if scores is None else scores[m.key],
                connect=connect,
                groups=m.groups,
                transposed=m.transposed,
                row_balance=None if m.heads == 1 or m.heads_on_inputs else m.heads,
                column_balance=m.heads if m.heads > 1 and m.heads_on_inputs else None,
            )
    return masks


def require_masked(model: nn.Module, masks: Mapping[str, Tensor], masked: Sequence[Masked], pattern: str) -> None:
    """Every planned mask is there and has its pattern, and every weight that it leaves out is zero.

    Raises:
        CheckFailed: a mask is gone (`.type()` turns masks into numbers) or has lost its pattern, or a weight has come back.
    """
    keys = [m.key for m in masked]
    gone = [key for key in keys if key not in masks]
    if gone:
        raise CheckFailed(
            f"masks are gone: {', '.join(gone[:5])}", hint="module.type() makes numbers of them; module.to() does not"
        )
    lost = [m.key for m in masked if not has_pattern(masks[m.key], pattern, m.groups, m.transposed)]
    if lost:
        raise CheckFailed(
            f"masks are no longer {pattern}: {', '.join(lost[:5])}",
            hint="a Sparsifier moves whole blocks, and N:M stays with algorithm static",
        )
    counts = ((key, int(model.get_parameter(key).detach().masked_fill(masks[key], 0).count_nonzero())) for key in keys)
    back = [f"{key}: {n:,}" for key, n in counts if n]
    if back:
        raise CheckFailed(
            f"weights that masks leave out are not zero: {'; '.join(back[:5])}",
            hint="a Sparsifier keeps them zero; module.weight.mul_(mask) sets them so",
        )


def dead_ends(masks: Mapping[str, Tensor], masked: Iterable[Masked]) -> tuple[int, int]:
    """(outputs without a weight, inputs that nothing reads) over all sparse weights."""
    rows = columns = 0
    for m in masked:
        r, c = empty_rows_and_columns(masks[m.key], m.groups, m.transposed)
        rows, columns = rows + r, columns + c
    return rows, columns
