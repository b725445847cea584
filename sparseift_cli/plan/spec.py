"""What a user asks for: the transform, and how the transformed network is trained. Checked on construction; no torch.

Every option is declared here and only here, on its annotated field: `base/options.py` says what is made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

from ..base.options import Option, check, not_read, require_read
from ..errors import UsageError, one_of
from ..mask.patterns import WRITTEN, MaskPattern, is_chosen, parse_pattern
from ..sparsity.algorithms import ALGORITHMS, MaskAlgorithm, make_algorithm, name_of
from ..sparsity.schedule import UpdateSchedule
from .distributions import DISTRIBUTIONS, Distribution, PerLayer, density
from .members import MEMBERS, written_name

Match = Literal["off", "layer", "model", "train"]
MATCHES: tuple[Match, ...] = get_args(Match)
Scope = Literal["all", "inner", "none"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
HeadScaling = Literal["scale_dim", "scale_count"]

ACTIVATIONS = ("relu", "relu6", "gelu", "silu", "hardswish", "mish", "elu", "selu", "leaky_relu")
"""Functions of torch.nn.functional that a member may apply."""

# The headings under which --help lists the options.
_TRANSFORM = "Transform"
_WIDE = "Sparse Wide"
_LOCAL = "Parallel, Factorized, Doped"
_TRAINING = "Training FLOPs"
_START = "Weights and masks at the start"


def _one_pattern(text: str) -> MaskPattern | None:
    """The pattern that is written so; None where each layer has its own."""
    return None if is_chosen(text) else parse_pattern(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformSpec:
    """One Sparse-IFT transform. Its options are declared here, for the command line, recipes and the documentation alike.

    Every option has the meaning of section 2 of the paper (arXiv 2303.11525), or is our own: scope inner and none, match model
    and train.

    Raises:
        UsageError: a value that does not exist, or a combination that contradicts itself.
    """

    member: Annotated[
        str,
        Option("The member of the Sparse-IFT family.", panel=_TRANSFORM, flags=("--transform", "-t"), names=MEMBERS),
    ] = "wide"
    sparsity: Annotated[
        str,
        Option(
            "The share of zeros in transformed layers: 0.9 means that nine of ten weights are zero.",
            panel=_TRANSFORM,
            flags=("--sparsity", "-s"),
            decimal=True,
            minimum=0,
            below=1,
            metavar="NUMBER",
            shown="",
        ),
    ] = "0.5"
    match: Annotated[
        Match,
        Option(
            "What keeps the dense model's FLOPs: each transformed layer, the model's forward pass, its training, or nothing.",
            panel=_TRANSFORM,
        ),
    ] = "layer"
    scope: Annotated[
        Scope,
        Option(
            "Which widths grow: all inner ones; only those that no residual stream shares; or none, as a control: the layers "
            "that all would widen are made sparse at their dense size (needs match off).",
            panel=_WIDE,
            only="wide",
        ),
    ] = "all"
    include: Annotated[
        tuple[str, ...],
        Option("Transform only layers whose name matches one of these globs.", panel=_TRANSFORM, metavar="GLOB"),
    ] = ()
    exclude: Annotated[
        tuple[str, ...],
        Option("Leave layers whose name matches one of these globs as they are.", panel=_TRANSFORM, metavar="GLOB"),
    ] = ()
    width_multiple: Annotated[
        int, Option("Round widths to a multiple of this.", panel=_WIDE, only="wide", minimum=1)
    ] = 1
    base_width: Annotated[
        int | None,
        Option(
            "New width of the stem; every other width keeps its proportion to it.",
            panel=_WIDE,
            only="wide",
            minimum=1,
        ),
    ] = None
    heads: Annotated[
        HeadScaling, Option("Attention grows by larger heads, or by more of them.", panel=_WIDE, only="wide")
    ] = "scale_dim"
    free_outputs: Annotated[
        tuple[str, ...],
        Option(
            "Outputs of the model that may grow: globs over their names (last_hidden_state; 0 in a tuple; '*' for all).",
            panel=_WIDE,
            only="wide",
            metavar="GLOB",
        ),
    ] = ()
    """For a model without a head, as a feature extractor: its output is its residual stream, which keeps its width otherwise."""
    depthwise: Annotated[
        Literal["dense", "sparse"],
        Option("Depthwise convolutions stay dense, or are made sparse.", panel=_WIDE, only="wide"),
    ] = "dense"
    branch_activation: Annotated[
        Literal["each", "sum"],
        Option("Norm and activation in each branch, or after the sum of branches.", panel=_LOCAL, only="parallel"),
    ] = "each"
    inner: Annotated[
        Literal["activation", "norm", "linear"],
        Option("What is between the factors U and V.", panel=_LOCAL, only="factorized"),
    ] = "activation"
    norm: Annotated[
        Literal["model", "batch_norm", "none"],
        Option(
            "Norm inside a transformed convolution: as in the model, batch norm, or none.",
            panel=_LOCAL,
            only="parallel, factorized",
        ),
    ] = "model"
    activation: Annotated[
        str,
        Option(
            "Activation inside a transformed layer: as in the model, none, or a function of torch.nn.functional (relu, gelu, "
            "silu, ...).",
            panel=_LOCAL,
            only="parallel, factorized",
            metavar="NAME",
        ),
    ] = "model"
    """`model`: the function that follows the layer in the model. Where a norm is between them in a Parallel layer, it is the
    function behind that norm which reads the layer itself, with no residual sum between them.
    """
    projections: Annotated[
        Literal["untouched", "transformed"],
        Option(
            "Whether attention projections are transformed; with no non-linearity between, they fold into one matrix.",
            panel=_LOCAL,
            only="parallel, factorized, doped",
        ),
    ] = "untouched"
    pattern: Annotated[
        str,
        Option(
            "Where zeros may be: unstructured, N:M (2:4), blocks (4x4), blocks after a random order of each layer's channels "
            "(shuffled:64x64), single weights with constant fan-in (fan_in) or fan-in and fan-out (fan_in_out), "
            "package.module:Name; or auto, for each layer the largest "
            "blocks of 128, 64 or 32 that are at least four a row, unstructured where there are none; or blocks64, those of 64 "
            "where there are two a row.",
            panel=_TRANSFORM,
            pattern=WRITTEN,
            reads=_one_pattern,
            metavar="PATTERN",
        ),
    ] = "unstructured"
    distribution: Annotated[
        str | Mapping[str, float | str] | PerLayer,
        Option(
            "How non-zeros are distributed over layers; er and erk need match model, train or off.",
            panel=_TRANSFORM,
            names=DISTRIBUTIONS,
            by_layer=True,
        ),
    ] = "uniform"
    """A name; or a mapping from globs over layer names to sparsities, which is kept as a `PerLayer`. The first glob that
    matches a layer decides. Under match model and train these layers keep their sparsity and the others share the rest of the
    budget; under match off the others have `sparsity`. er and erk share all non-zeros that `sparsity` leaves under match off.
    """

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "free_outputs"):
            if isinstance(getattr(self, name), str):  # one glob, or its letters would each be one
                object.__setattr__(self, name, (getattr(self, name),))
        try:
            density(self.sparsity)
        except (ValueError, ZeroDivisionError):
            raise UsageError(
                f"sparsity {self.sparsity!r} is not a number in [0, 1)",
                hint="0.9 means that 90 % of the weights are zero",
            ) from None
        object.__setattr__(self, "member", MEMBERS.canonical(self.member))
        if isinstance(self.distribution, Mapping):
            object.__setattr__(self, "distribution", PerLayer.of(self.distribution))
        elif isinstance(self.distribution, str):
            object.__setattr__(self, "distribution", DISTRIBUTIONS.canonical(self.distribution))
        elif not isinstance(self.distribution, PerLayer):
            raise UsageError(
                f"distribution {self.distribution!r} is neither a name nor a mapping from globs over layer names to sparsities",
                hint=f'{", ".join(DISTRIBUTIONS)}, package.module:Name, or {{"layer4.*": 0.95}}',
            )
        check(self)
        one_of("activation", self.activation.partition(":")[0], ("model", "none", *ACTIVATIONS))
        for name in ("width_multiple", "base_width"):
            size = getattr(self, name)
            if size is not None:
                object.__setattr__(self, name, int(size))  # an integer of numpy, too
        MEMBERS.get(self.member).check(self)
        require_read({name: getattr(self, name) for name in self.__slots__}, TransformSpec, self.member, "member")
        self._require_distribution()
        self._require_pattern()

    def _require_distribution(self) -> None:
        """The distribution can be used with what is matched."""
        matches = self.distribution_rule.matches
        if self.match in matches:
            return
        what = "it cannot match each layer" if self.match == "layer" else f"match {self.match} has no budget for it"
        first, *others = (m for m in ("model", "train", "off", "layer") if m in matches)
        raise UsageError(
            f"distribution {self.distribution} gives layers different FLOPs, so {what}",
            hint=f"use it with --match {first}" + (f", or {', '.join(others)}" if others else ""),
        )

    def _require_pattern(self) -> None:
        """The pattern exists, and one of fixed density (N:M) has the density of the sparsity."""
        fixed = self.fixed_density
        if fixed is not None and fixed != self.density:
            raise UsageError(
                f"pattern {self.pattern} has density {fixed}, not {self.density}",
                hint=f"use sparsity {float(1 - fixed)}",
            )

    @property
    def density(self) -> Fraction:
        return density(self.sparsity)

    @property
    def distribution_rule(self) -> Distribution:
        """The distribution itself, where `distribution` is its name."""
        if isinstance(self.distribution, str):
            return DISTRIBUTIONS.get(self.distribution)
        assert isinstance(self.distribution, PerLayer), "made so when the spec is made"
        return self.distribution

    @property
    def mask_pattern(self) -> MaskPattern | None:
        """The pattern itself, which `pattern` names; None for auto and blocks64, where each layer has its own."""
        return _one_pattern(self.pattern)

    @property
    def fixed_density(self) -> Fraction | None:
        """The only density that the pattern can have (N:M); None where it can have any."""
        return None if self.mask_pattern is None else self.mask_pattern.density

    @staticmethod
    def of(options: Mapping[str, Any]) -> TransformSpec:
        """From loose options (a command line, a recipe); checked as always."""
        return TransformSpec(**options)

    @staticmethod
    def overridden(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a recipe with those `given` on top. Where these name another member, what it does not read is left out."""
        others = not_read(TransformSpec, MEMBERS.canonical(given["member"])) if "member" in given else {}
        return {name: value for name, value in options.items() if name not in others} | dict(given)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["sparsity"] = float(Fraction(self.sparsity))
        data["member"] = written_name(self.member)
        if isinstance(self.distribution, PerLayer):
            data["distribution"] = self.distribution.to_json()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TransformSpec:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        fields = TransformSpec.overridden(fields, {"member": data["member"]})  # older versions kept what no member read
        return TransformSpec.of(fields | {"sparsity": str(data["sparsity"])})


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """How training FLOPs are counted: the mask algorithm and its options, and whether blocks are computed again.

    Args:
        algorithm: a name in `ALGORITHMS`, `package.module:Name`, or a `MaskAlgorithm` with its options.
        delta_t, stop: the two options that nearly every algorithm has; one that has none ignores them.
        steps: optimiser steps of the run; None for the limit of long runs.
        recompute: activation checkpointing, one more forward pass of every repeated block.
        options: further options of the algorithm.

    Raises:
        UsageError: a value that does not exist or is out of range, an option that the algorithm does not have.
    """

    algorithm: Annotated[str, Option("How masks change during training.", panel=_TRAINING, names=ALGORITHMS)] = "static"
    delta_t: Annotated[int, Option("Optimiser steps between two mask updates.", panel=_TRAINING, minimum=1)] = 100
    stop: Annotated[
        str,
        Option(
            "The share of the run after which masks stay as they are.",
            panel=_TRAINING,
            decimal=True,
            minimum=0,
            maximum=1,
            metavar="NUMBER",
        ),
    ] = "0.75"
    steps: Annotated[
        int | None,
        Option("Optimiser steps of the run; without it, the mean over a long run.", panel=_TRAINING, minimum=1),
    ] = None
    recompute: Annotated[
        bool,
        Option(
            "Activation checkpointing: less memory, a second forward pass of every repeated block; no CUDA graph.",
            panel=_TRAINING,
        ),
    ] = False

    options: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.algorithm, MaskAlgorithm):
            self._take(self.algorithm)
        object.__setattr__(self, "algorithm", ALGORITHMS.canonical(self.algorithm))
        try:
            stop = Fraction(self.stop)
        except (ValueError, ZeroDivisionError):
            stop = Fraction(-1)
        if not 0 <= stop <= 1:
            raise UsageError(
                f"stop {self.stop!r} is not a fraction of the run", hint="0.75 ends mask updates at 75 % of the steps"
            )
        check(self)
        _ = self.method  # made now, so that what is wrong with its options is found now

    def _take(self, algorithm: MaskAlgorithm) -> None:
        """Name and options of an algorithm that was given as an object."""
        given = {**algorithm.options(), **self.options}
        for name in ("delta_t", "stop"):
            if name in given:
                object.__setattr__(self, name, given.pop(name))
        object.__setattr__(self, "algorithm", name_of(algorithm))
        object.__setattr__(self, "options", given)

    @cached_property
    def method(self) -> MaskAlgorithm:
        """The algorithm with its options."""
        known = ALGORITHMS.get(self.algorithm).option_names()
        shared = {"delta_t": self.delta_t, "stop": self.stop}
        return make_algorithm(self.algorithm, {k: v for k, v in shared.items() if k in known} | dict(self.options))

    @staticmethod
    def of(options: Mapping[str, Any]) -> TrainingSpec:
        """From loose options (a recipe); checked as always."""
        return TrainingSpec(**options)

    @property
    def schedule(self) -> UpdateSchedule:
        """When masks change, by `delta_t`, `stop` and `steps`, whether the algorithm has any use for it or not."""
        return UpdateSchedule(self.delta_t, Fraction(self.stop), self.steps)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"stop": float(Fraction(self.stop))}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TrainingSpec:
        known: dict[str, Any] = dict(data)
        known["stop"] = str(known["stop"])
        return TrainingSpec(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class InitSpec:
    """Weights and masks at step 0.

    Raises:
        UsageError: a value that does not exist or is out of range.
    """

    start: Annotated[
        Literal["fresh", "preserve"],
        Option(
            "Draw weights anew, or preserve the function of a dense checkpoint (with scope none: its largest weights). Where the "
            "source has trained weights, one of the two must be given.",
            panel=_START,
            flags=("--init",),
        ),
    ] = "fresh"
    checkpoint: Annotated[
        str | None,
        Option("The dense checkpoint, a file or folder.", panel=_START, only="preserve", flags=("--init-checkpoint",)),
    ] = None
    key: Annotated[
        str | None,
        Option("Dotted path of the state dict in the checkpoint, as in 'ema'.", panel=_START, metavar="PATH"),
    ] = None
    weights: Annotated[
        Literal["dense", "density_scaled"],
        Option(
            "Standard deviations as in the dense model, or from the fan times the density.",
            panel=_START,
            only="fresh",
            flags=("--weight-init",),
        ),
    ] = "dense"
    masks: Annotated[
        Literal["random", "magnitude", "snip", "grasp", "force"],
        Option(
            "Which weights are kept: random ones, the largest, or by a score; snip, grasp and force read training batches.",
            panel=_START,
            only="fresh",
        ),
    ] = "random"
    slack: Annotated[
        float,
        Option(
            "This share of the weights, the smallest, goes to new channels.",
            panel=_START,
            only="preserve",
            flags=("--preserve-slack",),
            minimum=0,
            below=1,
        ),
    ] = 0.1
    connect: Annotated[bool, Option("Give every output a non-zero where the count allows.", panel=_START)] = True
    zero_residual: Annotated[
        bool,
        Option(
            "The residual branches of a ResNet begin at zero, by the scale of their last norm.",
            panel=_START,
            only="fresh",
        ),
    ] = False

    def __post_init__(self) -> None:
        check(self)
        require_read({name: getattr(self, name) for name in self.__slots__}, InitSpec, self.start, "init")
