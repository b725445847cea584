"""The maths of Sparse Iso-FLOP Transformations, in exact integers and Fractions. No torch; imports nothing of ours.

A dense layer has `groups` groups of D_in x D_out weights, D_in = taps * inputs / groups and D_out = outputs / groups. Each
weight is used `uses` times a forward pass (a conv's output positions, a linear's tokens), so MACs = uses * weights, and no
member of the family changes `uses`. What costs the same is therefore a matter of counting non-zeros.

Source: Thangarasa, Saxena, Gupta, Lie, "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency",
ICML 2024, arXiv 2303.11525, section 3 (the four members) and appendix (their FLOPs). The integer rounding is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil, floor, isqrt

from ..table.shape import Shape


def density(sparsity: float | str | Fraction) -> Fraction:
    """1 - s, with s read as it is written: 0.9 is nine tenths, not the nearest float.

    Raises:
        ValueError: the sparsity is not in [0, 1).
    """
    if len(str(sparsity).lower().partition("e")[2]) > 5:  # 1e-99999 is read in a blink, 1e-400000000 never
        raise ValueError(f"sparsity {sparsity} has an exponent without meaning")
    s = Fraction(str(sparsity))
    if not 0 <= s < 1:
        raise ValueError(f"sparsity {sparsity} is not in [0, 1)")
    return 1 - s


# --- the members -------------------------------------------------------------------------------------------------------


def scaled_width(width: int, square: Fraction, multiple: int = 1, *, down: bool = False) -> int:
    """The multiple of `multiple` nearest to width * sqrt(square), ties up, never below the dense width.

    `square` is the squared scale: 1/d for Sparse Wide (k = sqrt(1/d), paper eq. for Sparse Wide). `down` takes the
    largest multiple not above the ideal instead, which patterns of fixed density need to stay within the budget.
    """
    target = square * width * width / (multiple * multiple)
    if down:
        steps = isqrt(floor(target))
    else:  # largest n with n - 1/2 <= sqrt(target), that is 2n - 1 <= sqrt(4 target)
        steps = (isqrt(floor(4 * target)) + 1) // 2
    return max(steps, ceil(Fraction(width, multiple))) * multiple


def branches(d: Fraction) -> int:
    """Sparse Parallel: max(2, 1/d to the nearest integer, ties up) branches; the realised sparsity is 1 - 1/branches."""
    return max(2, floor(1 / d + Fraction(1, 2)))


def factorized_rank(layer: Shape, d: Fraction) -> int:
    """Sparse Factorized: rank per group r = ceil(r0 / d)."""
    return ceil(layer.rank / d)


def doped_rank(layer: Shape, d: Fraction) -> int:
    """Sparse Doped: rank per group r = floor(s * r0) of the dense factors; 0 means the layer stays as it is."""
    return floor((1 - d) * layer.rank)


def factors(layer: Shape, rank: int) -> tuple[Shape, Shape]:
    """(U, V) of a low-rank layer: U carries kernel, stride and groups, V is a grouped 1x1."""
    inner = layer.groups * rank
    return (
        Shape(layer.inputs, inner, layer.taps, layer.groups),
        Shape(inner, layer.outputs, 1, layer.groups),
    )


# --- non-zeros ---------------------------------------------------------------------------------------------------------


def nonzeros(budget_macs: Fraction | int, uses: int, weights: int) -> int:
    """floor(budget / uses), at least 1 and at most the weights there are: never above the budget, within one non-zero of it."""
    return max(1, min(weights, floor(Fraction(budget_macs) / uses)))


def share(nnz: int, weights: Sequence[int]) -> list[int]:
    """`nnz` dealt out in proportion to `weights`: floored, what is left one each to the last ones.

    For Sparse Factorized: floor(nnz |U| / (|U| + |V|)) to U, the rest to V.
    """
    total = sum(weights)
    parts = [nnz * w // total for w in weights]
    rest = nnz - sum(parts)
    return [n + (i >= len(parts) - rest) for i, n in enumerate(parts)]


def give_back(
    budgets: Sequence[Fraction],
    uses: Sequence[int],
    caps: Sequence[int],
    total: Fraction | int | None = None,
    cost: Callable[[int, int], Fraction | int] | None = None,
) -> list[int]:
    """Non-zeros per layer for fractional MAC `budgets`: floored, then one more each by largest remainder while it fits.

    What must fit is `total`, usually sum(budgets), and `cost(i, n)` what n non-zeros of layer i take of it, usually n * uses.
    Where it does not fit even floored (parts of unlike cost share a layer's), one less each by smallest remainder. No layer
    gets fewer than one.
    """
    price = cost or (lambda i, n: n * uses[i])
    exact = [b / u for b, u in zip(budgets, uses, strict=True)]
    nnz = [max(1, min(cap, floor(x))) for x, cap in zip(exact, caps, strict=True)]
    free = (sum(budgets, Fraction(0)) if total is None else total) - sum(price(i, n) for i, n in enumerate(nnz))
    order = sorted(range(len(nnz)), key=lambda i: (-(exact[i] - floor(exact[i])), uses[i], i))
    for i in reversed(order):
        if free < 0 and nnz[i] > 1:
            nnz[i] -= 1
            free += price(i, nnz[i] + 1) - price(i, nnz[i])
    for i in order:
        if free > 0 and nnz[i] < caps[i] and (more := price(i, nnz[i] + 1) - price(i, nnz[i])) <= free:
            nnz[i] += 1
            free -= more
    return nnz


def erdos_renyi(
    layers: Sequence[Shape], kernels: Sequence[tuple[int, ...]], uses: Sequence[int], macs: Fraction, *, kernel: bool
) -> list[Fraction]:
    """Densities proportional to the Erdos-Renyi score, scaled so that the layers together cost `macs`; capped at 1.

    Score (in + out + sum of kernel sizes) / (in * out * product of kernel sizes) for ERK, without the kernel for ER
    (Evci et al. 2020, "Rigging the Lottery", section 3(1)); layers that would exceed density 1 become dense and the scale
    is solved again.
    """
    score = []
    for layer, k in zip(layers, kernels, strict=True):
        d_in, d_out = layer.inputs // layer.groups, layer.outputs
        extra, product = (sum(k), layer.taps) if kernel else (0, 1)
        score.append(Fraction(d_in + d_out + extra, d_in * d_out * product))
    cost = [u * layer.weights for u, layer in zip(uses, layers, strict=True)]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(layers)) if i not in dense]
        if not rest:
            return [Fraction(1)] * len(layers)
        scale = (macs - sum(cost[i] for i in dense)) / sum(score[i] * cost[i] for i in rest)
        over = {i for i in rest if scale * score[i] > 1}
        if not over:
            return [Fraction(1) if i in dense else max(Fraction(0), scale * score[i]) for i in range(len(layers))]
        dense |= over


# --- whole-model match -------------------------------------------------------------------------------------------------


def match_scale(budget: Fraction | int, fixed: Fraction | int, transformed: Fraction | int) -> Fraction:
    """The factor on the transformed layers' cost that makes fixed + factor * transformed = budget (may be <= 0: no match)."""
    return (Fraction(budget) - fixed) / Fraction(transformed)


def greatest_sparsity(fixed_at: Callable[[float], float], budget: float) -> float:
    """s_max: the sparsity at which what is left alone fills the whole budget, by bisection on its growth with 1 - s.

    With one growth exponent it is 1 - (dense share of what is left alone)^2. 1.0 means that nothing left alone grows.
    """
    low, high = 0.0, 1.0 - 1e-9
    if fixed_at(1.0 - high) <= budget:
        return 1.0
    for _ in range(80):
        middle = (low + high) / 2
        if fixed_at(1.0 - middle) <= budget:
            low = middle
        else:
            high = middle
    return low
