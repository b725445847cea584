"""The whole way from a dense module to a transformed one, and what is remembered of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, nn

from ..errors import CheckFailed, UsageError, one_of
from ..mask.attached import attach, unwrapped
from ..plan.plan import Plan, make_plan
from ..plan.spec import TrainingSpec, TransformSpec
from ..trace.build import trace
from .check import Measured, deviation, measure, require_as_planned
from .edits import Surgery
from .initialise import Init, initialise
from .masking import dead_ends, draw_masks
from .preserve import preserve
from .surgery import operate, surgery_for

Start = Literal["fresh", "preserve"]
M = TypeVar("M", bound=nn.Module)
REMEMBERED = "_sparseift"  # the attribute of a transformed module that holds its Transformation


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the transformed module starts: its weights, its masks, its seed.

    `scores` ranks the weights to keep: None draws masks at random, `magnitude` keeps the largest weights, and a function
    of (module, {key of a sparse weight: its non-zeros}) gives scores by key.
    """

    start: Start = "fresh"
    init: Init = "dense"
    seed: int = 0
    connect: bool = True
    scores: Literal["magnitude"] | Callable[[nn.Module, dict[str, int]], Mapping[str, Tensor]] | None = None
    preserve_slack: float = 0.1

    def __post_init__(self) -> None:
        one_of("start", self.start, get_args(Start))
        one_of("init", self.init, get_args(Init))
        if not callable(self.scores):
            one_of("scores", self.scores or "magnitude", ("magnitude",))

    def to_json(self) -> dict[str, Any]:
        scores = self.scores if self.scores is None or isinstance(self.scores, str) else "a function"
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"scores": scores}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Options:
        known: dict[str, Any] = dict(data)
        known["scores"] = "magnitude" if known.get("scores") == "magnitude" else None
        return Options(**known)


@dataclass(frozen=True)
class Transformation:
    """What was done to a module: enough to print it, to write it to disk and to do it again."""

    plan: Plan
    surgery: Surgery
    measured: Measured
    options: Options
    dead: tuple[int, int] = (0, 0)
    """Outputs without a weight, and inputs that nothing reads, over all sparse weights."""
    deviation: float | None = None
    """preserve: largest difference to the dense model's output, relative to its largest value."""
    notes: tuple[str, ...] = ()
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """Resized buffers that a state dict leaves out and that surgery alone would make otherwise (preserve: old frequencies)."""
    source: Mapping[str, Any] | None = field(default=None)
    """How to build the dense model again, where a source names it."""


def transform_module(
    model: M,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    spec: TransformSpec,
    *,
    name: str,
    input_shape: tuple[int, ...],
    training: TrainingSpec | None = None,
    options: Options | None = None,
) -> tuple[M, Transformation]:
    """A transformed copy of `model`, and what was done. `model` itself is left as it is.

    A module on the meta device is transformed on it: planned, operated and counted, without weights or masks.

    Raises:
        UsageError: nothing can be transformed as asked, or the model does not run on the inputs or was transformed already.
        CheckFailed: no density fits the budget, or what came out is not what was planned.
    """
    options = options or Options()
    if transformation_of(model) is not None:  # its sparse layers would be taken for dense ones
        raise UsageError(f"{name} was transformed already", hint="transform the dense model again")
    on_meta = any(p.is_meta for p in model.parameters())
    if options.start == "preserve" and on_meta:
        raise UsageError("a model on the meta device has no function to preserve", hint="give it weights first")
    before = trace(model, inputs, kwargs, name=name, input_shape=input_shape)
    plan = make_plan(before.table, spec, training)
    surgery = surgery_for(plan, before.structure, model)
    new = operate(model, surgery)
    masks: dict[str, Tensor] | None = None
    notes: tuple[str, ...] = ()
    buffers: Mapping[str, Tensor] = {}
    if not on_meta:
        initialise(new, model, surgery, seed=options.seed, init=options.init)
        if options.start == "preserve":
            kept = preserve(
                new, model, plan, surgery, before.structure, seed=options.seed, slack=options.preserve_slack
            )
            masks, notes, buffers = kept.masks, kept.notes, kept.buffers
            surgery = replace(surgery, attributes=(*surgery.attributes, *kept.attributes))
        else:
            masks = draw_masks(
                new, plan, surgery, seed=options.seed, connect=options.connect, scores=_scores(new, surgery, options)
            )
        attach(new, masks, plan.spec.pattern)
    try:
        measured, after = measure(new, inputs, kwargs, plan, surgery, masks)
    except UsageError as error:  # the dense model ran on these inputs: it is not they that are wrong
        raise CheckFailed(
            f"what was made of it does not run: {error}",
            hint="--exclude the layers that it names, or try another member",
        ) from error
    require_as_planned(measured, plan, before, after)
    dead = dead_ends(masks, surgery.masked) if masks is not None else (0, 0)
    apart = deviation(new, model, inputs, kwargs) if options.start == "preserve" else None
    done = Transformation(plan, surgery, measured, options, dead, apart, notes, buffers)
    new.__dict__[REMEMBERED] = done
    return new, done


def transformation_of(model: nn.Module) -> Transformation | None:
    """What was done to a module that `transform` made or `load` read; None for any other."""
    return unwrapped(model).__dict__.get(REMEMBERED)


def _scores(model: nn.Module, surgery: Surgery, options: Options) -> Mapping[str, Tensor] | None:
    keys = [m.key for m in surgery.masked]
    if options.scores is None:
        return None
    if options.scores == "magnitude":
        return {key: model.get_parameter(key).detach().abs() for key in keys}
    return options.scores(model, {m.key: m.nnz for m in surgery.masked})
