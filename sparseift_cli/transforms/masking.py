"""Masks for a transformed module: the planned number of non-zeros, placed by the spec's pattern, heads and branches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import gcd
from typing import Any

from torch import Tensor, nn

from ..base.randomness import generator_for
from ..errors import CheckFailed
from ..mask.attached import Rows, mask_beside, mask_names, stores_blocks
from ..mask.layout import Layout
from ..mask.mask import disjoint_masks, empty_rows_and_columns, make_mask
from ..mask.patterns import has_pattern, parse_pattern
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
    """A mask for every sparse weight, by its key: bool, same shape as the weight, True at the planned number of positions.

    The branches of Sparse Parallel have independent masks, or disjoint ones where the branches have no non-linearity of
    their own (`branch_activation: sum`): the sum of two equal positions would be one weight.

    Args:
        seed: of the random positions; each mask also depends on its name, not on the other layers.
        connect: give every output a non-zero where the count allows.
        scores: by weight key, same shape as the weight: the highest are kept. None: random positions.

    Raises:
        UsageError: the pattern cannot hold the planned counts.
    """
    masks: dict[str, Tensor] = {}
    by_layer: dict[str, list[Masked]] = {}
    for m in surgery.masked:
        by_layer.setdefault(m.layer, []).append(m)
    disjoint = plan.member.sums_before_activation(plan.spec)
    for layer, parts in by_layer.items():
        if disjoint and scores is None:
            first = parts[0]
            branch_masks = disjoint_masks(
                tuple(model.get_parameter(first.key).shape),
                [m.nnz for m in parts],
                generator=generator_for(seed, "mask", layer),
                pattern=first.pattern,
                connect=connect,
                groups=first.groups,
                transposed=first.transposed,
            )
            masks |= {m.key: mask for m, mask in zip(parts, branch_masks, strict=True)}
            continue
        for m in parts:
            masks[m.name] = make_mask(
                tuple(m.of(model.get_parameter(m.key)).shape),
                m.nnz,
                generator=generator_for(seed, "mask", m.layer, m.part, *((m.rows or ())[: m.expert])),
                pattern=m.pattern,
                scores=None if scores is None else m.of(scores[m.key]),
                connect=connect,
                groups=m.groups,
                transposed=m.transposed,
                **_balance(m, tuple(m.of(model.get_parameter(m.key)).shape)),
            )
    return whole_masks(model, masks, surgery)


def _balance(m: Masked, shape: tuple[int, ...]) -> dict[str, int]:
    """Equal parts of the rows or columns of a weight of `shape`: its heads, or where a block has the weights of several, as
    many groups of heads as are whole blocks. A fused projection of 36 heads of 96 has nine of 384 in blocks of 128.
    """
    if m.heads == 1:
        return {}
    layout, sides = Layout(shape, m.groups, m.transposed), parse_pattern(m.pattern).sides
    size, side = (layout.columns, sides[1]) if m.heads_on_inputs else (layout.rows, sides[0])
    parts = 1 if size % side else gcd(m.heads, size // side)
    return {"column_balance" if m.heads_on_inputs else "row_balance": parts}


def whole_masks(model: nn.Module, masks: Mapping[str, Tensor], surgery: Surgery) -> dict[str, Tensor]:
    """Masks [*shape] by the keys of their weights, from masks by `Masked.name`: those of a weight's parts are put together.

    Rows that no part has stay dense: the forward pass does not use them.
    """
    whole: dict[str, Tensor] = {}
    for m in surgery.masked:
        if m.rows is None:
            whole[m.key] = masks[m.name]
            continue
        shape = tuple(model.get_parameter(m.key).shape)
        m.of(whole.setdefault(m.key, masks[m.name].new_ones(shape))).copy_(masks[m.name])
    return whole


def parts_of_masks(surgery: Surgery) -> dict[str, Rows]:
    """The rows of every part, by the key of a weight whose parts have numbers of non-zeros of their own."""
    found: dict[str, Rows] = {}
    for key in surgery.nonzeros:
        rows = tuple(m.rows for m in surgery.parts(key) if m.rows is not None)
        if rows:
            found[key] = rows
    return found


def follow_weights(model: nn.Module, masks: Mapping[str, Tensor], masked: Iterable[Masked]) -> None:
    """Read the masks of loaded weights from their zeros, in place, where non-zeros and pattern are those that were planned.

    Args:
        masks: by weight key: bool, same shape as the weight.
    """
    for m in masked:
        if m.key not in masks or in_blocks(model, m.key):  # where blocks are is loaded with them
            continue
        mask, weight = m.of(masks[m.key]), m.of(model.get_parameter(m.key).detach())
        nonzero = weight != 0
        spoiled = bool(weight.masked_fill(mask, 0).any())
        if (
            spoiled
            and int(nonzero.count_nonzero()) == m.nnz
            and has_pattern(nonzero, m.pattern, m.groups, m.transposed)
        ):
            mask.copy_(nonzero)


def in_blocks(model: nn.Module, key: str) -> bool:
    """Whether the weight of that name is stored in blocks, without its zeros."""
    return stores_blocks(model.get_submodule(key.rpartition(".")[0]))


class MasksOf(Mapping[str, Tensor]):
    """The masks [*shape] of a model by the names of their weights; those of layers that store blocks are made one at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._names = model, dict.fromkeys(mask_names(model))

    def __getitem__(self, key: str) -> Tensor:
        """The mask [*shape] of the weight of that name."""
        if key not in self._names:
            raise KeyError(key)
        path, _, name = key.rpartition(".")
        module: Any = self._model.get_submodule(path)
        mask = module.weight_mask if stores_blocks(module) else mask_beside(module, name)
        assert mask is not None
        return mask

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def shape_of(model: nn.Module, key: str) -> tuple[int, ...]:
    """The shape of the weight of that name, which may be stored in blocks."""
    path, _, name = key.rpartition(".")
    module: Any = model.get_submodule(path)
    return tuple(module.weight_shape if stores_blocks(module) else module.get_parameter(name).shape)


def weight_at(model: nn.Module, key: str) -> Tensor:
    """The weight [*shape] of that name, without its gradient; of a layer that stores blocks it is made for this call."""
    path, _, name = key.rpartition(".")
    return getattr(model.get_submodule(path), name).detach()


def excess_nonzeros(model: nn.Module, masked: Iterable[Masked]) -> dict[str, tuple[int, int]]:
    """By name, the non-zeros of the weights that have more of them than were planned, and the planned number."""
    counts = {m.name: (int(m.of(weight_at(model, m.key)).count_nonzero()), m.nnz) for m in masked}
    return {name: (found, planned) for name, (found, planned) in counts.items() if found > planned}


def require_masked(model: nn.Module, masks: Mapping[str, Tensor], masked: Sequence[Masked]) -> None:
    """Check that every planned mask exists and has its pattern, and that every weight outside a mask is zero.

    Args:
        masks: by weight key: bool, same shape as the weight.

    Raises:
        CheckFailed: a mask is missing (its module was replaced), has lost its pattern or has other than the planned
            non-zeros (GMP still prunes), or a weight outside one is not zero.
    """
    keys = list(dict.fromkeys(m.key for m in masked))
    missing = [key for key in keys if key not in masks]
    if missing:
        raise CheckFailed(
            f"masks are missing: {', '.join(missing[:5])}",
            hint="masks are buffers beside the weights: a module that was replaced has none",
        )
    changed = [m for m in masked if not has_pattern(m.of(masks[m.key]), m.pattern, m.groups, m.transposed)]
    if changed:
        raise CheckFailed(
            f"masks are no longer {changed[0].pattern}: {', '.join(m.name for m in changed[:5])}",
            hint="a Sparsifier moves whole blocks, and N:M needs the algorithm static",
        )
    found = {m.name: (int(m.of(masks[m.key]).count_nonzero()), m.nnz) for m in masked}
    other = [f"{name}: {have:,}, planned {want:,}" for name, (have, want) in found.items() if have != want]
    if other:
        denser = all(have >= want for have, want in found.values())
        raise CheckFailed(
            f"masks do not have the planned numbers of non-zeros: {'; '.join(other[:3])}"
            + (f" (and {len(other) - 3} more)" if len(other) > 3 else ""),
            hint="GMP and GraNet have them after their last update; until then torch.save keeps the state_dict"
            if denser
            else "masks were changed by hand; a Sparsifier keeps their numbers",
        )
    dense = [key for key in keys if not in_blocks(model, key)]
    counts = ((key, int(model.get_parameter(key).detach().masked_fill(masks[key], 0).count_nonzero())) for key in dense)
    nonzero = [f"{key}: {n:,}" for key, n in counts if n]
    if nonzero:
        raise CheckFailed(
            f"weights outside the masks are not zero: {'; '.join(nonzero[:5])}",
            hint="a Sparsifier keeps them zero; module.weight.mul_(mask) zeroes them",
        )


def count_unconnected(masks: Mapping[str, Tensor], masked: Iterable[Masked]) -> tuple[int, int]:
    """(outputs without a weight, inputs without one) over all sparse weights.

    Args:
        masks: by weight key: bool, same shape as the weight.
    """
    outputs = inputs = 0
    for m in masked:
        rows, columns = empty_rows_and_columns(m.of(masks[m.key]), m.groups, m.transposed)
        outputs, inputs = outputs + rows, inputs + columns
    return outputs, inputs
