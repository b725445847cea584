"""The whole way from a dense module to a transformed one, and the record of it that the new module keeps.

    trace -> plan -> surgery -> weights -> masks -> check

`trace` finds the layers and the widths, `make_plan` decides sizes and non-zeros, `surgery_for` and `apply_surgery` make a
module of these sizes, `initialise` or `preserve` give it weights, `draw_masks` the sparsity. The result is traced and
counted again.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, nn

from ..errors import CheckFailed, UsageError, one_of
from ..mask.attached import attach, unwrapped
from ..plan.plan import Plan, make_plan
from ..plan.spec import TrainingSpec, TransformSpec
from ..table.table import LayerTable
from ..trace.build import TraceResult, trace
from ..trace.structure import Structure
from .check import Measured, measure, require_as_planned
from .compare import SAME, first_difference, lost_by_configuration, measure_deviation
from .edits import Surgery
from .initialise import Init, initialise, preserve
from .masking import count_unconnected, draw_masks, parts_of_masks
from .members import torch_half
from .preserve import Preserved
from .surgery import apply_surgery, repeated_tables, surgery_for

Start = Literal["fresh", "preserve"]
M = TypeVar("M", bound=nn.Module)
_ATTRIBUTE = "_sparseift"  # of a transformed module; it holds the Transformation


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the transformed module starts: its weights, its masks, its seed.

    Args:
        start: `fresh` draws new weights; `preserve` keeps the function of the dense model. None, not chosen: fresh, with a
            warning where the model shows that it was trained (`initialise.trained_norm`).
        init: fresh weights as the dense model's were drawn, or `density_scaled`: larger by density ** -1/2.
        seed: of fresh weights and random masks.
        connect: random masks give every output a non-zero where the count allows.
        scores: which weights the masks keep. None: random ones. `magnitude`: the largest. A function of (module, {key
            of a sparse weight: its non-zeros}) returns scores by key, each with the shape of its weight; the highest
            are kept.
        preserve_slack: share of each layer's weights that `preserve` replaces by random ones on added channels.
    """

    start: Start | None = None
    init: Init = "dense"
    seed: int = 0
    connect: bool = True
    scores: Literal["magnitude"] | Callable[[nn.Module, dict[str, int]], Mapping[str, Tensor]] | None = None
    preserve_slack: float = 0.1

    def __post_init__(self) -> None:
        one_of("start", self.start or "fresh", get_args(Start))
        one_of("init", self.init, get_args(Init))
        if not callable(self.scores):
            one_of("scores", self.scores or "magnitude", ("magnitude",))

    def to_json(self) -> dict[str, Any]:
        """A function in `scores` is written as `a function`, and not restored."""
        scores = self.scores if self.scores is None or isinstance(self.scores, str) else "a function"
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "start": self.start or "fresh",
            "scores": scores,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Options:
        known: dict[str, Any] = dict(data)
        known["scores"] = "magnitude" if known.get("scores") == "magnitude" else None
        return Options(**known)


@dataclass(frozen=True)
class Transformation:
    """What was done to a module: enough to print it, to write it to disk and to do it again.

    >>> import torch
    >>> from sparseift_cli import transform
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> new, _ = transform(model, torch.zeros(1, 4), member="parallel", sparsity=0.5, branch_activation="sum")
    >>> done = transformation_of(new)
    >>> [(m.key, m.nnz) for m in done.surgery.masked]
    [('2.branches.0.0.weight', 32), ('2.branches.1.0.weight', 32)]
    >>> transformation_of(model) is None
    True
    """

    plan: Plan
    surgery: Surgery
    measured: Measured
    options: Options
    unconnected: tuple[int, int] = (0, 0)
    """Outputs without a weight, and inputs without one, over all sparse weights."""
    deviation: float | None = None
    """Start preserve: the largest difference to the dense model's output, relative to its largest value."""
    notes: tuple[str, ...] = ()
    """Sentences on what is not exact (start preserve), on tables and scales that do not follow the new widths, and on what
    `save_pretrained` would lose."""
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """Start preserve: resized buffers that are not in the state dict and that surgery would set otherwise (frequencies)."""
    source: Mapping[str, Any] | None = field(default=None)
    """How to build the dense model again, where a source names it."""

    def __deepcopy__(self, _: Any) -> Transformation:
        return self  # nothing in it changes

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a dictionary of plain values and tensors: a module that torch.save wrote has no class of ours for it."""
        return OrderedDict, (), None, None, iter(self.to_values().items())

    def to_values(self) -> dict[str, Any]:
        """Numbers, texts, lists, dictionaries and tensors, from which `from_values` makes it again."""
        plan = self.plan
        return {
            "table": plan.table.to_json(),
            "spec": plan.spec.to_json(),
            "training": plan.training.to_json(),
            "sizes": list(plan.sizes),
            "surgery": self.surgery.to_json(),
            "measured": asdict(replace(self.measured, macs={}))
            | {"macs": {k: str(n) for k, n in self.measured.macs.items()}},
            "options": self.options.to_json(),
            "unconnected": list(self.unconnected),
            "deviation": self.deviation,
            "notes": list(self.notes),
            "buffers": dict(self.buffers),
            "source": None if self.source is None else dict(self.source),
        }

    @staticmethod
    def from_values(values: Mapping[str, Any]) -> Transformation:
        """The inverse of `to_values`; the plan is made again."""
        table, training = LayerTable.from_json(values["table"]), TrainingSpec.from_json(values["training"])
        spec = TransformSpec.from_json(values["spec"])
        measured = Measured(**values["measured"])
        return Transformation(
            make_plan(table, spec, training, sizes=values.get("sizes")),
            Surgery.from_json(values["surgery"], spec.pattern),
            replace(measured, macs={name: Fraction(n) for name, n in measured.macs.items()}),
            Options.from_json(values["options"]),
            unconnected=tuple(values["unconnected"]),
            deviation=values["deviation"],
            notes=tuple(values["notes"]),
            buffers=values["buffers"],
            source=values["source"],
        )


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
    """A transformed copy of `model`, and the record of what was done. `model` itself does not change.

    At 75 % sparsity a hidden layer of 8 x 8 weights becomes 16 x 16 with 64 non-zeros. The first and the last layer
    widen with it and stay dense:

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> spec = TransformSpec(member="sparse_wide", sparsity="0.75")
    >>> new, done = transform_module(model, (torch.zeros(1, 4),), {}, spec, name="mlp", input_shape=(1, 4))
    >>> {name: int(macs) for name, macs in done.measured.macs.items()}
    {'0': 64, '2': 64, '4': 32}
    >>> new[2].weight.shape, int(new[2].weight.count_nonzero())
    (torch.Size([16, 16]), 64)

    A module on the meta device stays on it: it is planned, resized and counted, without weights or masks.

    Args:
        inputs, kwargs: arguments of the forward; only shapes and dtypes matter.
        name, input_shape: how tables and errors show the model and its input.
        training: how training FLOPs are counted and, with match train, matched.

    Raises:
        UsageError: the spec fits no layer, the model does not run on the inputs, or it was transformed before.
        CheckFailed: no density fits the budget, or the new module does not have the planned cost.
    """
    options = options or Options()
    on_meta = any(p.is_meta for p in model.parameters())
    _require_dense(model, name, preserve=options.start == "preserve")
    before = trace(model, inputs, kwargs, name=name, input_shape=input_shape)
    plan = make_plan(before.table, spec, training)
    surgery = surgery_for(plan, before.structure, model)
    new = apply_surgery(model, surgery)
    started = Preserved({}, ()) if on_meta else _start(new, model, plan, surgery, before.structure, options)
    edits, surgery = surgery, replace(surgery, attributes=(*surgery.attributes, *started.attributes))
    masks = None if on_meta else started.masks
    attach(new, started.masks, surgery.patterns, parts_of_masks(surgery))
    measured = _check_cost(new, inputs, kwargs, plan, surgery, masks, before)
    done = Transformation(
        plan,
        surgery,
        measured,
        options,
        unconnected=(0, 0) if masks is None else count_unconnected(masks, surgery.masked),
        notes=(*started.notes, *lost_by_configuration(new, inputs, kwargs)),
        buffers=started.buffers,
    )
    if options.start == "preserve":
        done = _with_deviation(done, new, model, inputs, kwargs, started, edits, before.structure)
    return record(new, done), done


def record(model: M, transformation: Transformation) -> M:
    """Store what was done on the transformed module, where `transformation_of` finds it; returns the module."""
    model.__dict__[_ATTRIBUTE] = transformation
    return model


def transformation_of(model: nn.Module) -> Transformation | None:
    """What was done to a module that `transform` made or `load` read; None for any other."""
    model = unwrapped(model)
    found = model.__dict__.get(_ATTRIBUTE)
    if isinstance(found, OrderedDict):  # the module was pickled
        found = Transformation.from_values(found)
        record(model, found)
    return found


def _require_dense(model: nn.Module, name: str, *, preserve: bool) -> None:
    if transformation_of(model) is not None:  # its sparse layers would count as dense ones
        raise UsageError(f"{name} was transformed already", hint="transform the dense model again")
    if preserve and any(p.is_meta for p in model.parameters()):
        raise UsageError("a model on the meta device has no function to preserve", hint="give it weights first")


def _start(
    new: nn.Module, dense: nn.Module, plan: Plan, surgery: Surgery, structure: Structure, options: Options
) -> Preserved:
    """Set the weights of `new` and choose its masks. A fresh start has masks and notes alone."""
    initialise(new, dense, surgery, seed=options.seed, init=options.init)
    if options.start == "preserve":
        return preserve(new, dense, plan, surgery, structure, seed=options.seed, slack=options.preserve_slack)
    scores = _scores(new, surgery, options)
    masks = draw_masks(new, plan, surgery, seed=options.seed, connect=options.connect, scores=scores)
    notes = torch_half(plan.member).notes(plan, structure, dense, surgery)
    return Preserved(masks, (*repeated_tables(dense, surgery), *notes))


def _with_deviation(
    done: Transformation,
    new: nn.Module,
    dense: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    started: Preserved,
    surgery: Surgery,
    structure: Structure,
) -> Transformation:
    """`done` with the deviation of `new` from `dense`, and with sentences on it that the preserving code could not know.

    With slack the function differs as it should. What else differs is found in a second copy without slack, made by `surgery`.

    Raises:
        CheckFailed: `new` computes NaN.
    """
    found, why = measure_deviation(new, dense, inputs, kwargs)
    if found == math.inf:
        raise CheckFailed(
            f"with the weights of the dense model, the wider {type(dense).__name__} computes NaN",
            hint="weight_norm divides by the length of a row, which is zero on added channels without slack: give some "
            "(--preserve-slack 0.1), or --init fresh",
        )
    if found is None or found <= 10 * SAME:
        return replace(done, deviation=found, notes=(*([why] if why else []), *done.notes))
    notes, exact = [], found
    if done.options.preserve_slack and done.plan.widening and done.plan.widening.widened:  # slack goes to new channels
        new = apply_surgery(dense, surgery)
        started = _start(new, dense, done.plan, surgery, structure, replace(done.options, preserve_slack=0.0))
        exact = measure_deviation(new, dense, inputs, kwargs)[0] or 0.0
        notes = [f"without the slack the largest difference would be {exact:.2g}"] if exact < math.inf else []
    if math.inf > exact > 10 * SAME and not any(note.startswith("not exact") for note in started.notes):
        at = first_difference(new, dense, inputs, kwargs, started.positions)
        notes.append(
            f"not exact at {at[0]}: its output is the first that differs, by {at[1]:.2g} of its largest value"
            if at
            else "not exact behind the layers and norms: all their outputs are the dense ones"
        )
    return replace(done, deviation=found, notes=(*notes, *done.notes))


def _check_cost(
    new: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plan: Plan,
    surgery: Surgery,
    masks: Mapping[str, Tensor] | None,
    before: TraceResult,
) -> Measured:
    try:
        measured, after = measure(new, inputs, kwargs, plan, surgery, masks)
    except UsageError as error:  # the dense model ran on these inputs, so the transform is at fault
        raise CheckFailed(
            f"the transformed model does not run: {error}",
            hint="--exclude the layers that it names, or try another member",
        ) from error
    require_as_planned(measured, plan, before, after)
    return measured


def _scores(model: nn.Module, surgery: Surgery, options: Options) -> Mapping[str, Tensor] | None:
    """Scores of the weights to keep, by key, each with the shape of its weight; None for random masks."""
    keys = surgery.nonzeros
    if options.scores is None:
        return None
    if options.scores == "magnitude":
        return {key: model.get_parameter(key).detach().abs() for key in keys}
    return options.scores(model, keys)
