"""The sparse training algorithms by name."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from ..base.randomness import counters, words
from ..errors import one_of
from .schedule import START_DENSITY, Schedule, nonzeros_at

# What a sparse training algorithm decides. Everything else (when, how many, exactness, state) is the Sparsifier's.
# The axes are separate: a pattern (unstructured, blocks) says what moves together, a schedule when and how many, and an
# algorithm which: by a drop score, a grow score and a density to start from. RigL is SET with another grow score.


@dataclass(frozen=True)
class MaskAlgorithm:
    """Masks that stay as they are; subclasses say what moves.

    A drop score ranks active weights, the lowest go first; a grow score ranks free places, the highest come first. Both are
    float32, in the weight's shape and on its device.
    """

    name: ClassVar[str]
    exchanges: ClassVar[bool] = False
    """Weights move at mask updates: as many are grown as were dropped."""
    uses_gradient: ClassVar[bool] = False
    """The grow score needs the dense gradient of the update's step."""
    start: ClassVar[Fraction | None] = None
    """Density at step 0 where that is above the final one; None: the masks that are attached."""

    def drop_scores(self, weight: Tensor) -> Tensor:
        """Magnitude: |w| after the optimiser step."""
        return weight.detach().float().abs()

    def grow_scores(self, weight: Tensor, gradient: Tensor | None, key: int | Tensor) -> Tensor:
        """Random: every free place is as likely as any other. The same numbers on every device, made there.

        Minus a number from [0, 1): floats are finest near zero, where the highest of these lie, so that ties are rare.
        """
        random = words(key, counters(0, weight.numel(), weight.device))
        return random.bitwise_and_((1 << 63) - 1).to(torch.float32).mul_(-(2.0**-63)).view(weight.shape)

    def nonzeros(self, step: int, start: int, final: int, schedule: Schedule) -> int:
        """The non-zeros (or blocks) that step `step` computes with."""
        return final


# No sparsity: the transformed network with every weight in use, or a network that has no masks at all.


class Dense(MaskAlgorithm):
    """Masks are opened wholly and stay so: 3 f_D a step. The Sparsifier has nothing to do."""

    name: ClassVar[str] = "dense"
    start: ClassVar[Fraction | None] = Fraction(1)

    def nonzeros(self, step: int, start: int, final: int, schedule: Schedule) -> int:
        return start


# Static sparsity: the masks of the start, for the whole run.


class Static(MaskAlgorithm):
    """Masks never move. Costs 3 f_S a step, and is what SET, RigL and the others are compared with."""

    name: ClassVar[str] = "static"


# Sparse Evolutionary Training: drop the smallest weights, grow as many at random.
# Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
# science", Nature Communications 2018, arXiv 1707.04780. There a fixed share of the weights closest to zero is exchanged after
# every epoch; here every `delta_t` steps, with the schedule of the drop fraction that all algorithms share.


class SET(MaskAlgorithm):
    """Magnitude drops, chance grows; no dense gradient is ever needed."""

    name: ClassVar[str] = "set"
    exchanges: ClassVar[bool] = True


# RigL: drop the smallest weights, grow where the dense gradient is largest.
# Source: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv 1911.11134,
# algorithm 1 and section 3. Grown weights start at zero. The paper updates masks *in place of* a gradient step; here the step
# is taken too, and first, and its gradient (of all micro-batches and ranks) decides: no batch is lost.


class RigL(SET):
    """SET with another grow score: |dL/dw| of the update's step, at the places that have no weight."""

    name: ClassVar[str] = "rigl"
    uses_gradient: ClassVar[bool] = True

    def grow_scores(self, weight: Tensor, gradient: Tensor | None, key: int | Tensor) -> Tensor:
        assert gradient is not None
        return gradient.float().abs()


# Gradual magnitude pruning: start dense, prune the smallest weights on a cubic schedule, never grow.
# Source: Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017, arXiv
# 1710.01878, eq. 1. Under Sparse Wide it starts with the whole widened network, so it costs more than the dense model: 1.19,
# 1.56, 2.69 times at sparsity .5, .75, .9.


class GMP(MaskAlgorithm):
    """From dense to the attached number of non-zeros, at `delta_t`, 2 `delta_t`, ..., and the last time at `stop`."""

    name: ClassVar[str] = "gmp"
    start: ClassVar[Fraction | None] = START_DENSITY["gmp"]

    def nonzeros(self, step: int, start: int, final: int, schedule: Schedule) -> int:
        return nonzeros_at(step, start, final, schedule)


# GraNet: prune gradually from half density, and at every update also exchange weights as RigL does.
# Source: Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021, arXiv
# 2106.10404, algorithm 1: the cubic schedule of Zhu & Gupta, then regeneration by gradient at an unchanged number of non-zeros.
# The paper ranks the weights of all layers together; an iso-FLOP plan has fixed every layer's number, so each layer is pruned
# by itself (the paper's "uniform" variant).


class GraNet(RigL):
    """RigL on masks that GMP's schedule thins out, from density 0.5 or the final one where that is higher."""

    name: ClassVar[str] = "granet"
    start: ClassVar[Fraction | None] = START_DENSITY["granet"]

    def nonzeros(self, step: int, start: int, final: int, schedule: Schedule) -> int:
        return nonzeros_at(step, start, final, schedule)


ALGORITHMS: dict[str, MaskAlgorithm] = {a.name: a for a in (Dense(), Static(), SET(), RigL(), GMP(), GraNet())}


def algorithm_named(name: str) -> MaskAlgorithm:
    """`rigl`, `set`, ... as an algorithm.

    Raises:
        UsageError: no such algorithm. (SNFS is a row of the cost model only: it needs a dense gradient every step.)
    """
    one_of("algorithm", name, list(ALGORITHMS))
    return ALGORITHMS[name]
