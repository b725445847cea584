"""The maths of Sparse Iso-FLOP Transformations, in exact integers and Fractions. No torch; imports nothing of ours.

A dense layer has `groups` groups of D_in x D_out weights, D_in = taps * inputs / groups and D_out = outputs / groups. Each
weight is used `uses` times a forward pass (a conv's output positions, a linear's tokens), so MACs = uses * weights, and no
member of the family changes `uses`. What costs the same is therefore a matter of counting non-zeros.

Source: Thangarasa, Saxena, Gupta, Lie, "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency",
ICML 2024, arXiv 2303.11525, section 3 (the four members) and appendix (their FLOPs). The integer rounding is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor, isqrt
from typing import Literal

Algorithm = Literal["dense", "static", "set", "snfs", "rigl", "gmp", "granet"]
ALGORITHMS: tuple[Algorithm, ...] = ("dense", "static", "set", "snfs", "rigl", "gmp", "granet")


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


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense layer: `inputs` and `outputs` in channels or features over all groups, `taps` = k_h * k_w (1 for a linear)."""

    inputs: int
    outputs: int
    taps: int = 1
    groups: int = 1

    @property
    def weights(self) -> int:
        """Number of weights, biases apart."""
        return self.taps * self.inputs * self.outputs // self.groups

    def blocks(self, rows: int, columns: int) -> int:
        """Whole blocks of rows (outputs) x columns (inputs and taps); none crosses from one group to the next."""
        return self.groups * (self.outputs // self.groups // rows) * (self.taps * self.inputs // self.groups // columns)

    @property
    def rank(self) -> Fraction:
        """r0, the rank per group at which U V costs what the dense layer costs: D_in D_out / (D_in + D_out)."""
        d_in, d_out = self.taps * self.inputs // self.groups, self.outputs // self.groups
        return Fraction(d_in * d_out, d_in + d_out)

    @property
    def depthwise(self) -> bool:
        """One input channel a group."""
        return self.groups > 1 and self.groups == self.inputs


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


def give_back(budgets: Sequence[Fraction], uses: Sequence[int], caps: Sequence[int], total: Fraction | int | None = None,
              cost: Callable[[int, int], Fraction | int] | None = None) -> list[int]:  # fmt: skip
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


def erdos_renyi(layers: Sequence[Shape], kernels: Sequence[tuple[int, ...]], uses: Sequence[int], macs: Fraction,
                *, kernel: bool) -> list[Fraction]:  # fmt: skip
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


# --- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepCost:
    """MACs of one training step of a set of layers: the forward pass, input gradients (dX) and weight gradients (dW)."""

    forward: Fraction | int = 0
    grad_input: Fraction | int = 0
    grad_weight: Fraction | int = 0

    @property
    def total(self) -> Fraction | int:
        return self.forward + self.grad_input + self.grad_weight

    def times(self, n: Fraction | int) -> StepCost:
        """Of `n` such sets."""
        return StepCost(n * self.forward, n * self.grad_input, n * self.grad_weight)


@dataclass(frozen=True, slots=True)
class Schedule:
    """When masks change: every `delta_t` steps, 0 < t < stop * steps. Without `steps` the long-run limit is meant."""

    delta_t: int = 100
    stop: Fraction = Fraction(3, 4)
    steps: int | None = None

    @property
    def end(self) -> int:
        """The first step at which masks no longer change."""
        return ceil(self.stop * (self.steps or 0))

    @property
    def updates(self) -> int | None:
        """#{t : 0 < t < stop * steps, delta_t | t}; step 0 never updates. None without `steps`."""
        return None if self.steps is None else max(0, self.end - 1) // self.delta_t

    @property
    def update_rate(self) -> Fraction:
        """Mask updates per training step over the whole run."""
        if self.steps is None or self.updates is None:
            return self.stop / self.delta_t
        return Fraction(self.updates, self.steps)

    def remaining(self) -> Fraction:
        """Mean over the run of (1 - progress)^3, the part of the pruning still to come (Zhu & Gupta 2017, eq. 1).

        Progress moves every `delta_t` steps; its mean over a long run is stop / 4.
        """
        return self.stop / 4 if self.steps is None else _remaining(self.delta_t, self.end) / self.steps

    def remaining_at_updates(self) -> Fraction:
        """Sum over the mask updates, per training step, of (1 - progress)^3 at each: their steps compute with what is left."""
        if self.steps is None:
            return self.update_rate / 4
        return _remaining_at_updates(self.delta_t, self.end) / self.steps


@lru_cache(maxsize=64)  # matching asks again for every layer and density
def _remaining(delta_t: int, end: int) -> Fraction:
    held = sum((min(t + delta_t, end) - t) * (end - t) ** 3 for t in range(0, end, delta_t))
    return Fraction(held, end**3) if end else Fraction(0)


@lru_cache(maxsize=64)
def _remaining_at_updates(delta_t: int, end: int) -> Fraction:
    return Fraction(sum((end - t) ** 3 for t in range(delta_t, end, delta_t)), end**3) if end else Fraction(0)


def nonzeros_at(step: int, start: int, final: int, schedule: Schedule) -> int:
    """The non-zeros (or blocks) that step `step` computes with, on the cubic way from `start` down to `final`.

    final + floor((start - final) (1 - progress)^3), Zhu & Gupta 2017 ("To prune, or not to prune", eq. 1). Progress moves
    every `delta_t` steps, from 0 at step 0, and is 1 from `schedule.end` on; steps between have the number of the last
    multiple of `delta_t`. Integers throughout, so the number is exact: never above the formula's, within one of it.
    """
    end = schedule.end
    if step >= end or start <= final:
        return final
    left = end - step // schedule.delta_t * schedule.delta_t
    return final + (start - final) * left**3 // end**3


@lru_cache(maxsize=4096)  # layers and branches of one size have the same
def nonzeros_over_run(start: int, final: int, schedule: Schedule) -> tuple[int, int]:
    """`nonzeros_at` summed over all steps of a run, and over those with a mask update."""
    end, over_steps, over_updates = schedule.end, 0, 0
    for t in range(0, end, schedule.delta_t):
        n = nonzeros_at(t, start, final, schedule)
        over_steps += (min(t + schedule.delta_t, end) - t) * n
        over_updates += n if t else 0
    return over_steps + ((schedule.steps or 0) - end) * final, over_updates


START_DENSITY: dict[Algorithm, Fraction] = {"gmp": Fraction(1), "granet": Fraction(1, 2)}


def mean_step(algorithm: Algorithm, schedule: Schedule, sparse: StepCost, first: StepCost, dense: StepCost) -> Fraction:
    """MACs of the mean training step of weights: `sparse` at their final non-zeros, `first` at step 0, `dense` without masks.

    `dense` is the same weight of the *transformed* network, not of the model one started from. `first` differs from `sparse`
    only under dense, GMP and GraNet, and there only for weights that have a mask, train, and are not above the start already.

    * dense 3 f_D; static and SET 3 f_S; SNFS 2 f_S + f_D: a dense dW every step.
    * RigL 3 f_S, and at each mask update a dense dW in place of the sparse one. (3 f_S dT + 2 f_S + f_D)/(dT + 1) is the
      approximation of Evci et al. 2020, appendix H, for a run that never stops updating.
    * GMP: the cubic schedule from dense (Zhu & Gupta 2017); GraNet: the same from half, with RigL's dense dW at its updates
      (Liu et al. 2021).
    """
    if algorithm == "dense":
        return Fraction(first.total)
    mean = Fraction(sparse.total)
    grown = dense.grad_weight - sparse.grad_weight
    if algorithm == "snfs":
        return mean + grown
    if algorithm in START_DENSITY:
        mean += schedule.remaining() * (first.total - sparse.total)
        if algorithm == "granet":
            pruned = first.grad_weight - sparse.grad_weight
            mean += schedule.update_rate * grown - schedule.remaining_at_updates() * pruned
    if algorithm == "rigl":
        mean += schedule.update_rate * grown
    return mean


def updating_step(schedule: Schedule, sparse: StepCost, dense: StepCost) -> Fraction:
    """The mean step of RigL while its masks still change."""
    return sparse.total + Fraction(dense.grad_weight - sparse.grad_weight) / schedule.delta_t
