"""The mask algorithms: which weights of a sparse network are zero, when that changes, and what it costs. One class each.

A pattern (unstructured, blocks) says what moves together, a plan how many non-zeros each weight has; an algorithm says which,
by a drop score and a grow score. Everything else (exact counts, ties, optimiser state, resuming) is the `Sparsifier`'s work, so
an algorithm of your own is a few lines:

    @dataclass(frozen=True, kw_only=True)
    class Sensitivity(DropAndGrow):
        "Drops where |weight * gradient| is smallest, grows where |gradient| is largest."

        dense_gradient = "at updates"

        def drop_scores(self, at: WeightView) -> Tensor:
            return (at.weight * at.gradient).abs()

        def grow_scores(self, at: WeightView) -> Tensor:
            return at.gradient.abs()

Wherever an algorithm is named (recipes, `--algorithm`, `Sparsifier`, `TrainingSpec`), `package.module:Sensitivity` names it.
No torch is imported here: counting FLOPs, recipes and help need none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from fractions import Fraction
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ..base.options import Option, check
from ..base.registry import Registry
from ..errors import SparseiftError, UsageError
from ..mask.layout import Layout
from .schedule import (
    Decay,
    StepCost,
    UpdateSchedule,
    drop_fraction,
    drops,
    nonzeros_at,
    nonzeros_over_run,
    updates_at,
)

if TYPE_CHECKING:
    from torch import Tensor

DenseGradient = Literal["never", "at updates", "every step"]
Regrow = Literal["allow", "forbid"]
GrownState = Literal["zero", "mean"]
Growth = Literal["magnitude", "normalised", "balanced"]
RandomGrowth = Literal["random", "balanced"]


@dataclass(frozen=True, slots=True)
class WeightView:
    """One weight as scores see it, after the optimiser's step. Score functions change none of these tensors."""

    weight: Tensor
    """[*shape]; zero where the mask is False."""
    gradient: Tensor | None = None
    """dL/dw [*shape] at every place, masked or not, averaged over micro-batches and ranks. None at steps without a dense
    gradient, which are those of `dense_gradient`; gradual pruning too takes place at others than mask updates."""
    state: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    """The algorithm's own tensors [*shape], float32, by the names in `MaskAlgorithm.state`."""
    key: int | Tensor = 0
    """What random scores are a function of: the seed, the weight's name and the step, hashed."""
    layout: Layout | None = None
    """How the weight is a matrix; None: as a linear layer or convolution without groups."""

    def random_scores(self) -> Tensor:
        """Scores [*shape] in (-1, 0], independent and uniform; the same on every device and rank, made where the weight is.

        Negative because floats are finest near zero, where the highest scores are: ties among those are rare.
        """
        from ..base.randomness import counters, words

        random = words(self.key, counters(0, self.weight.numel(), self.weight.device))
        return random.bitwise_and_((1 << 63) - 1).float().mul_(-(2.0**-63)).view(self.weight.shape)

    def normalised(self, scores: Tensor) -> Tensor:
        """|scores| [*shape], float32, each divided by the Euclidean norm of its row and by that of its column.

        Rows are outputs, columns the inputs of a group at one tap (`Layout`). A gradient is a sum of products of what a unit
        gets back and what it reads, so its largest entries are in few rows and columns, and the connections that grow there
        crowd; divided by both norms, every unit is as likely to get some. Where a norm is zero, so is the score.
        """
        layout = self.layout or Layout(tuple(scores.shape))
        matrix = layout.to_matrix(scores.float().abs()).view(layout.groups, -1, layout.columns)
        # squares of tiny numbers are zero, and then the norm is that of the largest: no score is infinite
        norms = [matrix.norm(dim=d, keepdim=True).maximum(matrix.amax(d, keepdim=True)) for d in (2, 1)]
        for norm in norms:
            matrix = matrix / norm.clamp_(min=2.0**-126)
        return layout.from_matrix(matrix.view(layout.rows, layout.columns))


_OWN = (
    *("__post_init__", "drop_scores", "grow_scores", "observe", "schedule", "updates_at", "drops", "nonzeros"),
    *("mean_nonzeros", "mean_step", "updating_step"),
)
"""What an algorithm may override. Where one from outside fails in these, the error names it."""


def _naming_errors(cls: type, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, with everything but our own errors raised as one that says which algorithm failed, and in what."""

    @wraps(method)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except SparseiftError:
            raise
        except Exception as error:
            raise UsageError(
                f"the mask algorithm {cls.__module__}:{cls.__qualname__} failed in {name}: {type(error).__name__}: {error}",
                hint="the traceback, of --debug on the command line, shows where",
            ) from error

    return named


@dataclass(frozen=True, kw_only=True)
class MaskAlgorithm:
    """Masks that stay as they are: the base of all algorithms. Its fields are the options that recipes and `Sparsifier` take.

    Raises:
        UsageError: an option out of its range.
    """

    masked: ClassVar[bool] = True
    """Whether it needs a network with masks."""
    drops_and_grows: ClassVar[bool] = False
    """Whether mask updates replace weights: as many grow as were dropped."""
    dense_gradient: ClassVar[DenseGradient] = "never"
    """Which steps compute the weight gradient at every place, not only where the mask is True. Decides cost, and `gradient`."""
    grows_by_gradient_alone: ClassVar[bool] = False
    """Whether `grow_scores` reads nothing but `gradient`: layers of stored blocks then score and free it during backward."""
    start_density: ClassVar[Fraction | None] = None
    """Density at step 0 where that may be above the planned one; None: training starts with the planned masks."""
    state: ClassVar[tuple[str, ...]] = ()
    """Names of float32 tensors [*shape] kept for every weight. They start at zero, are saved in checkpoints, and no mask
    update touches them: an algorithm that wants them zero where a weight was dropped does that in `observe`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "grow_scores" in vars(cls) and "grows_by_gradient_alone" not in vars(cls):
            cls.grows_by_gradient_alone = False  # whatever its base says: these are other scores
        if not cls.__module__.startswith(__name__.partition(".")[0] + "."):
            for name in _OWN:
                if name in vars(cls):
                    setattr(cls, name, _naming_errors(cls, name, vars(cls)[name]))

    def __post_init__(self) -> None:
        check(self)

    # --- which weights ---

    def drop_scores(self, at: WeightView) -> Tensor:
        """Scores [*shape] of the active weights; the lowest are dropped. Magnitude, |w| after the optimiser's step."""
        return at.weight.abs()

    def grow_scores(self, at: WeightView) -> Tensor:
        """Scores [*shape] of the places without a weight; the highest grow. Random."""
        return at.random_scores()

    def observe(self, at: WeightView) -> None:
        """Update `at.state` in place; called after every optimiser step that was made, and before a mask update of that step."""

    # --- when, and how many ---

    def schedule(self, steps: int | None) -> UpdateSchedule:
        """When masks change in a run of so many optimiser steps; None means the limit of long runs."""
        return UpdateSchedule(delta_t=1, stop=Fraction(0), steps=steps)

    def updates_at(self, step: int, schedule: UpdateSchedule) -> bool:
        """Whether weights are dropped and grown after step `step`."""
        return self.drops_and_grows and updates_at(schedule, step)

    def drops(self, active: int, step: int, schedule: UpdateSchedule) -> int:
        """How many of `active` weights (or blocks) the update of step `step` drops, and grows elsewhere."""
        return 0

    def nonzeros(self, step: int, start: int, final: int, schedule: UpdateSchedule) -> int:
        """The non-zeros (or blocks) that step `step` computes with: between `start`, those at step 0, and the planned `final`.

        An algorithm that overrides this must override `mean_nonzeros` accordingly.
        """
        return final

    # --- what it costs ---

    def mean_nonzeros(
        self, start: Fraction | int, final: Fraction | int, schedule: UpdateSchedule, block: int | None = None
    ) -> tuple[Fraction, Fraction]:
        """`nonzeros`, summed over the steps of a run and over its mask updates, both divided by the number of steps.

        Args:
            start, final: non-zeros at step 0 and as planned.
            schedule: without steps, the limit of long runs is meant.
            block: the weights that move together, 1 if single ones do, to count whole ones; None: before rounding.
        """
        return Fraction(final), final * schedule.update_rate

    def mean_step(
        self,
        cost: StepCost,
        start: Fraction | int,
        final: Fraction | int,
        weights: Fraction | int,
        schedule: UpdateSchedule,
        block: int | None = None,
    ) -> Fraction:
        """MACs of the mean training step of one weight tensor.

        Every step costs `cost` for each non-zero; steps with a dense gradient also a weight gradient at each of the other
        places. With f_S and f_D the forward MACs of the tensor sparse and dense: static and SET 3 f_S, SNFS 2 f_S + f_D, RigL
        3 f_S and at updates 2 f_S + f_D.

        Args:
            cost: MACs of one step for one non-zero.
            weights: places of the tensor. Other arguments as in `mean_nonzeros`.
        """
        over_steps, over_updates = self.mean_nonzeros(start, final, schedule, block)
        mean = cost.total * over_steps
        if self.dense_gradient == "every step":
            return mean + cost.grad_weight * (weights - over_steps)
        if self.dense_gradient == "at updates":
            return mean + cost.grad_weight * (schedule.update_rate * weights - over_updates)
        return mean

    @property
    def costs_more_while_updating(self) -> bool:
        """Whether steps cost more before `stop` than after it, and only because of dense gradients at mask updates."""
        return self.dense_gradient == "at updates" and self.start_density is None

    def updating_step(self, cost: StepCost, final: int, weights: int, schedule: UpdateSchedule) -> Fraction:
        """MACs of the mean step while masks still change, where `costs_more_while_updating`.

        Evci et al. 2020, appendix H, approximate it as (3 f_S dT + 2 f_S + f_D)/(dT + 1).
        """
        return Fraction(cost.total * final) + Fraction(cost.grad_weight * (weights - final), schedule.delta_t)

    # --- words ---

    @classmethod
    def summary(cls) -> str:
        """One line for help and tables."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The options it takes."""
        return tuple(f.name for f in fields(cls))

    @property
    def keeps(self) -> tuple[bool, bool]:
        """Whether every row, and every column, of a weight keeps its number of non-zeros when masks move."""
        return False, False

    @property
    def moves(self) -> bool:
        """Whether any mask can differ from the planned one."""
        return self.drops_and_grows or self.start_density is not None

    def options(self) -> dict[str, Any]:
        """Its options by name, as JSON values."""
        return {name: getattr(self, name) for name in self.option_names()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The defaults of its options: what a run had that was saved before an option existed."""
        return {f.name: f.default for f in fields(cls) if f.default is not MISSING}


# --- no sparsity, static sparsity -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dense(MaskAlgorithm):
    """Every weight is used: the transformed network without its masks, or a network that has none."""

    masked: ClassVar[bool] = False
    start_density: ClassVar[Fraction | None] = Fraction(1)

    def nonzeros(self, step: int, start: int, final: int, schedule: UpdateSchedule) -> int:
        return start

    def mean_nonzeros(
        self, start: Fraction | int, final: Fraction | int, schedule: UpdateSchedule, block: int | None = None
    ) -> tuple[Fraction, Fraction]:
        return Fraction(start), start * schedule.update_rate


@dataclass(frozen=True, kw_only=True)
class Static(MaskAlgorithm):
    """The masks of the start, for the whole run; what the others are compared with."""


# --- drop and grow ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scheduled(MaskAlgorithm):
    """Base of the algorithms whose masks change every `delta_t` steps, for the first part of a run."""

    delta_t: Annotated[int, Option("Optimiser steps between two mask updates.", minimum=1)] = 100
    stop: Annotated[
        str, Option("Part of the run after which masks stay as they are.", decimal=True, minimum=0, maximum=1)
    ] = "0.75"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", str(self.stop))
        super().__post_init__()

    def schedule(self, steps: int | None) -> UpdateSchedule:
        return UpdateSchedule(self.delta_t, Fraction(self.stop), steps)


@dataclass(frozen=True, kw_only=True)
class DropAndGrow(Scheduled):
    """Base of the algorithms that drop some active weights and grow as many others; by themselves, those of SET."""

    drops_and_grows: ClassVar[bool] = True

    drop_fraction: Annotated[
        float, Option("Part of the active weights that the first update drops and grows.", minimum=0, maximum=1)
    ] = 0.3
    decay: Annotated[Decay, Option("How the drop fraction falls until `stop`.")] = "cosine"
    regrow: Annotated[Regrow, Option("Whether a weight may return in the update that dropped it.")] = "allow"
    grown_state: Annotated[
        GrownState,
        Option(
            "What the optimiser's tensors (momentum, moments) have for a weight that grows: zero, or the mean of the layer's "
            "active ones, with which Adam's first step is no larger than others."
        ),
    ] = "zero"

    def drops(self, active: int, step: int, schedule: UpdateSchedule) -> int:
        return drops(active, drop_fraction(self.decay, self.drop_fraction, step, schedule))

    @property
    def balanced(self) -> bool:
        """Whether rows and columns of a weight keep their numbers of active places in an update: by its option `growth`."""
        return getattr(self, "growth", None) == "balanced"

    @property
    def keeps(self) -> tuple[bool, bool]:
        rows = self.balanced and self.start_density is None
        return rows, rows and self.regrow == "allow"


@dataclass(frozen=True, kw_only=True)
class SET(DropAndGrow):
    """Sparse Evolutionary Training: drops the smallest weights, grows as many at random. Never needs a dense gradient.

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
    network science", Nature Communications 2018, arXiv 1707.04780. There a fixed part of the weights closest to zero is replaced
    after every epoch; here every `delta_t` steps, with the decaying drop fraction that all algorithms share.
    """

    growth: Annotated[
        RandomGrowth,
        Option("Where weights grow: anywhere (random), or so that every output and input keeps its number (balanced)."),
    ] = "random"


@dataclass(frozen=True, kw_only=True)
class GrowsByGradient(DropAndGrow):
    """Base of the algorithms that grow where a dense gradient is large."""

    growth: Annotated[
        Growth,
        Option(
            "Where weights grow, so that connections do not crowd in few units: by the gradient's magnitude alone; by that, "
            "divided by the norms of its row and of its column (normalised); or by magnitude, but every output and input "
            "keeps its number of weights (balanced)."
        ),
    ] = "magnitude"

    def scores_of(self, at: WeightView, gradient: Tensor) -> Tensor:
        """Scores [*shape] of a gradient, or of a mean of gradients, [*shape]."""
        return at.normalised(gradient) if self.growth == "normalised" else gradient.abs()


@dataclass(frozen=True, kw_only=True)
class RigL(GrowsByGradient):
    """Drops the smallest weights, grows where the dense gradient of the update's step is largest.

    Source: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv 1911.11134,
    section 3 and algorithm 1. Grown weights start at zero. The paper updates masks in place of a gradient step; here the step
    is made too, and first, and its gradient (of all micro-batches and ranks) decides: no batch is lost.

    `growth: normalised` and `balanced` are ours. On text RigL was worse than fixed masks: its fan-in and fan-out varied 2.8 to
    3.0 times as much as those of random masks, and dividing |gradient| by the Euclidean norms of its row and its column gave
    most of the difference back (the row's alone or the column's alone did not). Measured: notes of
    recipes/gpt_wikitext2/results. The strict form is `balanced`: `drop_and_grow.balanced_drop_and_grow`.
    """

    dense_gradient: ClassVar[DenseGradient] = "at updates"
    grows_by_gradient_alone: ClassVar[bool] = True

    def grow_scores(self, at: WeightView) -> Tensor:
        """|dL/dw| [*shape], or as `growth` says."""
        assert at.gradient is not None
        return self.scores_of(at, at.gradient)


@dataclass(frozen=True, kw_only=True)
class SNFS(GrowsByGradient):
    """Sparse Networks from Scratch: drops the smallest weights, grows where the mean of past dense gradients is largest.

    Source: Dettmers, Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing Performance", 2019, arXiv
    1907.04840, section 3 and algorithm 1. The mean is an exponential one, m <- momentum m + (1 - momentum) dL/dw, over all
    places and all steps, so every step computes a dense weight gradient: 2 f_S + f_D. The paper also moves weights between
    layers by each layer's share of the mean; an iso-FLOP plan fixes the non-zeros of every layer, so here each layer is
    updated within itself.
    """

    dense_gradient: ClassVar[DenseGradient] = "every step"
    state: ClassVar[tuple[str, ...]] = ("momentum",)

    momentum: Annotated[
        float, Option("Decay of the mean of past dense gradients, by which weights grow.", minimum=0, below=1)
    ] = 0.9

    def observe(self, at: WeightView) -> None:
        assert at.gradient is not None
        at.state["momentum"].mul_(self.momentum).add_(at.gradient, alpha=1 - self.momentum)

    def grow_scores(self, at: WeightView) -> Tensor:
        """|m| [*shape], or as `growth` says."""
        return self.scores_of(at, at.state["momentum"])


# --- gradual pruning --------------------------------------------------------------------------------------------------


class _CubicPruning(MaskAlgorithm):
    """Non-zeros fall from `start_density` to the planned ones by the cubic of Zhu & Gupta 2017, eq. 1."""

    def nonzeros(self, step: int, start: int, final: int, schedule: UpdateSchedule) -> int:
        return nonzeros_at(step, start, final, schedule)

    def mean_nonzeros(
        self, start: Fraction | int, final: Fraction | int, schedule: UpdateSchedule, block: int | None = None
    ) -> tuple[Fraction, Fraction]:
        if block and schedule.steps:
            steps, updates = nonzeros_over_run(int(start // block), int(final // block), schedule)
            return Fraction(block * steps, schedule.steps), Fraction(block * updates, schedule.steps)
        return (
            final + schedule.remaining() * (start - final),
            schedule.update_rate * final + schedule.remaining_at_updates() * (start - final),
        )


@dataclass(frozen=True, kw_only=True)
class GMP(_CubicPruning, Scheduled):
    """Gradual magnitude pruning: starts dense and prunes the smallest weights on a cubic schedule; nothing ever grows.

    Source: Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017, arXiv
    1710.01878, section 3 and eq. 1. Prunes at `delta_t`, 2 `delta_t`, ..., and the last time at `stop`. Under Sparse Wide it
    starts with the whole widened network, so a run costs more than the dense model's: 1.19, 1.56, 2.69 times at .5, .75, .9.
    """

    start_density: ClassVar[Fraction | None] = Fraction(1)


@dataclass(frozen=True, kw_only=True)
class GraNet(_CubicPruning, RigL):
    """Prunes gradually from half density (or the planned one where that is higher), and drops and grows as RigL does.

    Source: Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021, arXiv
    2106.10404, algorithm 1: the cubic schedule of Zhu & Gupta, then regeneration by gradient at an unchanged number of
    non-zeros. The paper ranks the weights of all layers together; an iso-FLOP plan fixes every layer's number, so each layer is
    pruned by itself (the paper's "uniform" variant).
    """

    start_density: ClassVar[Fraction | None] = Fraction(1, 2)


# --- by name ----------------------------------------------------------------------------------------------------------


def _why_not(found: object) -> str | None:
    """Why an object from outside is no mask algorithm."""
    if not (isinstance(found, type) and issubclass(found, MaskAlgorithm)):
        return "it must be a subclass of sparseift_cli.sparsity.algorithms.MaskAlgorithm"
    for name in ("nonzeros", "mean_nonzeros"):
        owner = next(c for c in found.__mro__ if name in vars(c))
        if not ({"nonzeros", "mean_nonzeros"} <= set(vars(owner))):
            return f"{owner.__name__} overrides {name}; nonzeros and mean_nonzeros count the same and are overridden together"
    return None


SHIPPED: Mapping[str, type[MaskAlgorithm]] = {
    "dense": Dense,
    "static": Static,
    "set": SET,
    "snfs": SNFS,
    "rigl": RigL,
    "gmp": GMP,
    "granet": GraNet,
}
ALGORITHMS = Registry[type[MaskAlgorithm]]("mask algorithm", "algorithms", SHIPPED, check=_why_not)

_ONCE_SHARED = {"delta_t": "100", "drop_fraction": "0.3", "decay": "cosine", "stop": "0.75", "regrow": "allow"}
"""Options that every algorithm used to take, with their defaults: recipes and runs written then have them all."""


def own_options(algorithm: str, options: Mapping[str, Any], *, whatever_value: bool = False) -> dict[str, Any]:
    """`options` without those of `_ONCE_SHARED` that the algorithm does not take, where they have the old default.

    Args:
        whatever_value: leave these out with any value, so that one set of options serves a loop over algorithms.

    Raises:
        UsageError: no such algorithm.
    """
    known = ALGORITHMS.get(algorithm).option_names()
    idle = {k for k in options if k not in known and k in _ONCE_SHARED}
    return {k: v for k, v in options.items() if k not in idle or not (whatever_value or str(v) == _ONCE_SHARED[k])}


def make_algorithm(algorithm: str | MaskAlgorithm, options: Mapping[str, Any] | None = None) -> MaskAlgorithm:
    """An algorithm by its name, `package.module:Name`, or itself; with its options.

    >>> make_algorithm("rigl", {"delta_t": 500}).schedule(steps=10_000).updates
    14

    Raises:
        UsageError: no such algorithm; an option that it does not take, or a value out of range.
    """
    given = dict(options or {})
    if isinstance(algorithm, MaskAlgorithm):
        if given:
            raise UsageError(f"{', '.join(given)}: give them to {type(algorithm).__name__}(...) itself")
        return algorithm
    chosen, given = ALGORITHMS.get(algorithm), own_options(algorithm, given)
    known = chosen.option_names()
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UsageError(
            f"{algorithm} has no option {', '.join(unknown)}",
            hint=f"it takes {', '.join(known)}" if known else "it takes none",
        )
    return chosen(**given)


def name_of(algorithm: MaskAlgorithm) -> str:
    """What the algorithm is called in recipes: its name in the registry, or `package.module:Name`."""
    kind = type(algorithm)
    for name in ALGORITHMS:
        if ALGORITHMS.get(name) is kind:
            return name
    return f"{kind.__module__}:{kind.__qualname__}"


def why_masked(name: str) -> str:
    """Why layers that store their non-zeros alone cannot train by the algorithm called `name`; empty where they can.

    >>> why_masked("granet"), why_masked("rigl")
    ('granet begins denser than the planned masks', '')
    """
    algorithm = ALGORITHMS.get(name)
    if not algorithm.masked:
        return "trained without masks"
    return f"{name} begins denser than the planned masks" if algorithm.start_density is not None else ""


def choose_algorithm(
    algorithm: str | Mapping[str, Any] | MaskAlgorithm, options: Mapping[str, Any]
) -> tuple[MaskAlgorithm, str]:
    """The algorithm with its options, and what it is called; given as a name, a mapping with its name, or itself.

    Raises:
        UsageError: no such algorithm; an option that it does not take, or a value out of range.
    """
    given = dict(options)
    if "schedule" in given:  # the name that `decay` had
        given["decay"] = given.pop("schedule")
    if isinstance(algorithm, Mapping):  # as recipes have it
        given = {k: v for k, v in algorithm.items() if k != "name"} | given
        algorithm = str(algorithm.get("name", ""))
    if isinstance(algorithm, MaskAlgorithm):
        return make_algorithm(algorithm, given), name_of(algorithm)
    made = make_algorithm(algorithm, own_options(algorithm, given, whatever_value=True))
    return made, ALGORITHMS.canonical(algorithm)
