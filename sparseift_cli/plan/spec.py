"""What a user asks for: the transform, and how the transformed network would be trained. Checked on construction; no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any, Literal, get_args

from ..errors import UsageError, did_you_mean, one_of
from ..sparsity.schedule import ALGORITHMS, Algorithm, Schedule
from .isoflop import density
from .widths import HeadScaling

Member = Literal["sparse_wide", "sparse_parallel", "sparse_factorized", "sparse_doped"]
MEMBERS: tuple[Member, ...] = get_args(Member)
Match = Literal["off", "layer", "model", "train"]
MATCHES: tuple[Match, ...] = get_args(Match)
Scope = Literal["all", "inner", "none"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

ACTIVATIONS = ("relu", "relu6", "gelu", "silu", "hardswish", "mish", "elu", "selu", "leaky_relu")
"""Functions of torch.nn.functional that may stand inside a member."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformSpec:
    """One Sparse-IFT transform. Every field has the meaning of section 2 of the paper or is named as ours.

    Raises:
        UsageError: a value that does not exist, or a combination that contradicts itself.
    """

    member: Member = "sparse_wide"
    sparsity: str = "0.5"
    match: Match = "layer"  # what is held iso-FLOP: nothing, each transformed layer, the model's forward, its training
    scope: Scope = "all"
    """Which widths Sparse Wide grows: every inner one (the paper), only those no stream shares, or none.

    With `none` the layers that `all` would widen become sparse at their dense size: 1 - s of their FLOPs, no iso-FLOP
    transform but the control of one.
    """
    include: tuple[str, ...] = ()  # globs on layer names
    exclude: tuple[str, ...] = ()
    width_multiple: int = 1
    base_width: int | None = None  # new width of the stem; every other width keeps its proportion to it
    heads: HeadScaling = "scale_dim"
    depthwise: Literal["dense", "sparse"] = "dense"
    branch_activation: Literal["each", "sum"] = (
        "each"  # Sparse Parallel: norm and activation per branch, or after the sum
    )
    inner: Literal["activation", "norm", "linear"] = "activation"  # Sparse Factorized: what stands between U and V
    norm: Literal["model", "batch_norm", "none"] = "model"  # inside Parallel and Factorized convolutions
    activation: str = (
        # there too: the one that follows in the model (in Parallel, behind a norm: that reads the layer itself, with no sum in
        # between), a function of torch.nn.functional, or none
        "model"
    )
    projections: Literal["untouched", "transformed"] = "untouched"  # of attention, under the local members
    pattern: str = "unstructured"  # or N:M, or RxC blocks
    distribution: Literal["uniform", "er", "erk"] = "uniform"

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):  # one glob, or its letters would each be one
                object.__setattr__(self, name, (getattr(self, name),))
        try:
            density(self.sparsity)
        except (ValueError, ZeroDivisionError):
            raise UsageError(
                f"sparsity {self.sparsity!r} is not a number in [0, 1)",
                hint="0.9 means that 90 % of the weights are zero",
            ) from None
        one_of("transform", self.member, MEMBERS)
        one_of("match", self.match, MATCHES)
        one_of("scope", self.scope, SCOPES)
        one_of("heads", self.heads, ("scale_dim", "scale_count"))
        one_of("depthwise", self.depthwise, ("dense", "sparse"))
        one_of("branch_activation", self.branch_activation, ("each", "sum"))
        one_of("inner", self.inner, ("activation", "norm", "linear"))
        one_of("distribution", self.distribution, ("uniform", "er", "erk"))
        one_of("norm", self.norm, ("model", "batch_norm", "none"))
        one_of("activation", self.activation.partition(":")[0], ("model", "none", *ACTIVATIONS))
        one_of("projections", self.projections, ("untouched", "transformed"))
        for name in ("width_multiple", "base_width"):
            size = getattr(self, name)
            if size is not None:
                if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
                    raise UsageError(f"{name.replace('_', ' ')} {size!r} is not a positive whole number")
                object.__setattr__(self, name, int(size))  # numpy's are whole numbers too
        if self.scope == "none":
            self._require_control()
        if self.distribution != "uniform" and self.match not in ("model", "train"):
            raise UsageError(
                f"distribution {self.distribution} gives layers different FLOPs, so it cannot match each layer",
                hint="use it with --match model",
            )
        if self.n_of_m and Fraction(*self.n_of_m) != self.density:
            n, m = self.n_of_m
            raise UsageError(
                f"pattern {n}:{m} has density {n}/{m}, not {self.density}", hint=f"use sparsity {1 - n / m}"
            )
        if not (self.pattern == "unstructured" or self.n_of_m or self.block):
            raise UsageError(
                f"unknown pattern {self.pattern!r}", hint="use unstructured, N:M (2:4) or a block RxC (4x4)"
            )

    def _require_control(self) -> None:
        """Scope none widens nothing, so it can hold no budget and set no width."""
        what = "scope none widens nothing: the same layers become sparse at their dense size"
        if self.member != "sparse_wide":
            raise UsageError(
                f"{what}, which is a control of wide, not {self.member.removeprefix('sparse_')}",
                hint="use member wide, or leave scope out",
            )
        if self.match != "off":
            raise UsageError(
                f"{what}, at fewer FLOPs than the dense model's, so match {self.match} cannot be held",
                hint="use it with match off",
            )
        if self.distribution != "uniform":
            raise UsageError(
                f"{what}, each to the sparsity itself, so distribution {self.distribution} has no budget to spread",
                hint="use distribution uniform",
            )
        if self.base_width is not None:
            raise UsageError(f"{what}, so base width {self.base_width} contradicts it", hint="leave one of them out")

    @property
    def density(self) -> Fraction:
        return density(self.sparsity)

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern with 0 < N <= M."""
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if not found or not 0 < int(found[1]) <= int(found[2]):
            return None
        return int(found[1]), int(found[2])

    @property
    def block(self) -> tuple[int, int] | None:
        """(rows, columns) of a block pattern."""
        found = re.fullmatch(r"(\d+)x(\d+)", self.pattern)
        if not found or not int(found[1]) * int(found[2]):
            return None
        return int(found[1]), int(found[2])

    @staticmethod
    def of(options: Mapping[str, Any]) -> TransformSpec:
        """From loose options (a command line, a recipe); checked as always."""
        return TransformSpec(**options)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["sparsity"] = float(Fraction(self.sparsity))
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TransformSpec:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return TransformSpec.of(fields | {"sparsity": str(data["sparsity"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """How training FLOPs are counted: the algorithm, its mask schedule, and whether blocks are computed again."""

    algorithm: Algorithm = "static"
    delta_t: int = 100
    stop: str = "0.75"
    steps: int | None = None
    recompute: bool = False  # activation checkpointing: one more forward of every repeated block

    def __post_init__(self) -> None:
        one_of("algorithm", self.algorithm, ALGORITHMS)
        if self.delta_t < 1 or (self.steps is not None and self.steps < 1):
            raise UsageError("the number of steps and the steps between mask updates must be positive")
        try:
            stop = Fraction(self.stop)
        except (ValueError, ZeroDivisionError):
            stop = Fraction(-1)
        if not 0 <= stop <= 1:
            raise UsageError(
                f"stop {self.stop!r} is not a fraction of the run", hint="0.75 ends mask updates at 75 % of the steps"
            )

    @staticmethod
    def of(options: Mapping[str, Any]) -> TrainingSpec:
        """From loose options (a recipe); checked as always."""
        return TrainingSpec(**options)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.delta_t, Fraction(self.stop), self.steps)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"stop": float(Fraction(self.stop))}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TrainingSpec:
        known: dict[str, Any] = dict(data)
        known["stop"] = str(known["stop"])
        return TrainingSpec(**known)


def member_named(word: str) -> Member:
    """`wide`, `sparse-wide` or `sparse_wide`.

    Raises:
        UsageError: no such member.
    """
    name = word.lower().replace("-", "_").removeprefix("sparse_")
    for member in MEMBERS:
        if member == f"sparse_{name}":
            return member
    short = [m.removeprefix("sparse_") for m in MEMBERS]
    raise UsageError(f"unknown transform {word!r}", hint=did_you_mean(name, short) or f"known: {', '.join(short)}")
