"""Which mask pattern each layer of a plan has: that of the spec, or under `auto` and `blocks64` square blocks that suit it. Pure.

Kernels compute a square block of 128 x 128 faster than one of 64, and that faster than one of 32. But with few blocks in a row
a layer has little choice of what an output reads, and on narrow layers that costs accuracy. So `auto` takes for each layer the
largest of `BLOCKS` of which it has `LEAST` or more in the mean row of blocks, and single weights where it has so many of none.
`blocks64` takes blocks of 64 in every layer that has `LEAST_NAMED` a row of them. In a convolution a block is B outputs by B
inputs with all taps of the kernel, since that is what its kernels compute.

How many non-zeros a layer has is known when they are allocated, and they are allocated in blocks. So the first allocation is
one of single weights, and says which blocks are tried; where rounding to whole blocks leaves a layer with too few of them,
the next smaller ones are tried. Blocks get only smaller, so this ends, and every layer of the result has enough. Widths come
before all this (`members/wide`): they are rounded to multiples of the largest block that leaves them near to their ideal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING

from ..mask.patterns import MaskPattern, is_chosen, parse_pattern, side_of_blocks
from .layer_plan import EXPERTS, LayerPlan

if TYPE_CHECKING:
    from .spec import TransformSpec

BLOCKS = (128, 64, 32)
"""Sides of the square blocks that auto chooses from, the largest first."""
LEAST = 4
"""Blocks that the mean row of blocks has at least under auto."""
LEAST_NAMED = 2
"""The same where the side is named: with one block a row, an output would read the inputs of a single block."""

Allocated = tuple[list[LayerPlan], Fraction | None]


def allocate_in_patterns(
    layers: Sequence[LayerPlan],
    spec: TransformSpec,
    sizes: Sequence[int],
    allocate: Callable[[Sequence[LayerPlan]], Allocated],
) -> Allocated:
    """Give every transformed layer its pattern, and what `allocate` gives it in that pattern: its non-zeros.

    Args:
        layers: the rows of a plan, transformed ones with all their weights.
        sizes: the new size of every width, by id.
        allocate: from rows with patterns to rows with non-zeros, and the scale that was solved for.

    Raises:
        UsageError, CheckFailed: what `allocate` raises.
    """
    if not is_chosen(spec.pattern):
        pattern = parse_pattern(spec.pattern)
        own = _with_own if pattern.by_layer else lambda row, _: replace(row, pattern=spec.pattern)
        return allocate([own(p, pattern) if p.status == "transformed" else p for p in layers])
    side = side_of_blocks(spec.pattern)
    choices = _choices(layers, sizes, *((BLOCKS, LEAST) if side is None else ((side,), LEAST_NAMED)))
    found = allocate(layers)
    again = bool(choices)
    while again:
        for row in found[0]:
            if row.status == "transformed":
                choices[_weight(row)].shrink(row)
        patterned = [choices[_weight(row)].applied(row) if row.status == "transformed" else row for row in layers]
        again = [row.pattern for row in patterned] != [row.pattern for row in found[0]]
        found = allocate(patterned)
    return found


def _with_own(row: LayerPlan, pattern: MaskPattern) -> LayerPlan:
    """A transformed row in its form of a pattern that has another one for every layer."""
    whole = row.layer.start is None and not row.layer.stacked and row.layer.kind != EXPERTS
    why = "" if whole else "one of several layers in a weight: its channels keep their order"
    return replace(row, pattern=pattern.for_layer(_weight(row), whole).name, why_pattern=why)


@dataclass
class _Choice:
    """The blocks that may still be chosen for the rows that use one weight, whose mask has one pattern.

    Args:
        sides: of those that fit it, the largest first.
        least: blocks that the mean row of blocks must have.
        why: why it has no larger ones.
    """

    sides: list[int]
    least: int
    why: str = ""

    def shrink(self, row: LayerPlan) -> None:
        """Drop the blocks of which a row with its non-zeros has too few."""
        while self.sides and (found := _blocks_a_row(row, self.sides[0])) < self.least:
            self.why = f"fewer than {self.least} blocks of {self.sides[0]} a row: {floor(10 * found) / 10}"
            self.sides.pop(0)

    def applied(self, row: LayerPlan) -> LayerPlan:
        """The row in the chosen pattern: B outputs by B inputs with all taps, or single weights."""
        side = self.sides[0] if self.sides else 0
        pattern = f"{side}x{side * row.masked_parts[0].shape.taps}" if side else "unstructured"
        return replace(row, pattern=pattern, why_pattern=self.why)


def _choices(layers: Sequence[LayerPlan], sizes: Sequence[int], sides: Sequence[int], least: int) -> dict[str, _Choice]:
    """Which blocks of these sides fit each weight."""
    choices: dict[str, _Choice] = {}
    for row in layers:
        if row.status == "transformed":
            choice = choices.setdefault(_weight(row), _Choice(list(sides), least))
            for side in tuple(choice.sides):
                if why := _misfit(row, side, sizes):
                    choice.sides.remove(side)
                    choice.why = why
    return choices


def _weight(row: LayerPlan) -> str:
    return row.layer.weight or row.layer.name


def _misfit(row: LayerPlan, side: int, sizes: Sequence[int]) -> str | None:
    """Why a layer does not consist of square blocks of this side; up to a colon it is the same for layers of a kind."""
    layer, shapes = row.layer, [part.shape for part in row.masked_parts]
    if layer.stacked or layer.kind == EXPERTS or any(shape.groups > 1 for shape in shapes):
        return "stacked matrices" if layer.stacked else layer.kind
    if layer.kind == "conv_transpose":
        return "transposed convolution"
    if len({shape.taps for shape in shapes}) > 1:
        return "parts with different kernels"
    if shapes[0].taps > 1 and layer.kernel != (3, 3):
        return f"{'x'.join(map(str, layer.kernel))} kernel"
    start = 0 if layer.start is None else layer.start.evaluate(sizes)
    wrong = next((s for s in shapes if s.inputs % side or s.outputs % side), None)
    if wrong is not None or start % side:
        return f"no whole blocks of {side}" + (
            f": {wrong.inputs}>{wrong.outputs}" if wrong else f": from row {start} on"
        )
    return None


def _blocks_a_row(row: LayerPlan, side: int) -> Fraction:
    """Blocks in the mean row of blocks, of the part that has the fewest."""
    parts = ((part.nnz, part.shape) for part in row.masked_parts)
    return min(Fraction(nnz, shape.outputs * side * shape.taps) for nnz, shape in parts)


def blocks_of_widths(spec: TransformSpec) -> tuple[tuple[int, ...], Fraction]:
    """What new widths and ranks are multiples of, the best first, and how far from its ideal a width may be for it, as a share.

    Half a block is better than none, as fewer weights are in no block. Blocks that the user named are worth more than an ideal
    width that follows from the sparsity; those that auto may yet choose are not, and no block is worth more than a width that
    the user named (`base_width`).
    """
    pattern = spec.mask_pattern
    named = side_of_blocks(spec.pattern)
    if pattern is None and named is None:
        return BLOCKS, Fraction(1, 8)
    near = Fraction(1, 2) if spec.base_width is None else Fraction(1, 8)
    sides = [named or (pattern.width_multiple if pattern is not None and pattern.density is None else 1)]
    while sides[-1] % 2 == 0:
        sides.append(sides[-1] // 2)
    return tuple(side for side in sides if side > 1), near


def chosen_in_words(layers: Sequence[LayerPlan]) -> str:
    """How many layers have which blocks under auto or blocks64, and why the rest has none: a sentence without full stop."""
    rows = [row for row in layers if row.status == "transformed"]
    sides = Counter(int(row.pattern.partition("x")[0]) for row in rows if not row.mask_pattern.unrestricted)
    parts = [f"of {side} in {n}" for side, n in sorted(sides.items(), reverse=True)]
    if parts:
        parts[0] = f"blocks {parts[0]} " + ("layer" if sides[max(sides)] == 1 else "layers")
    reasons = Counter(row.why_pattern.partition(":")[0] for row in rows if row.mask_pattern.unrestricted)
    if reasons:
        why = "; ".join(f"{n}: {why}" if len(reasons) > 1 else why for why, n in reasons.most_common())
        parts.append(f"{reasons.total()}{'' if parts else ' layers'} unstructured ({why})")
    return ", ".join(parts)
