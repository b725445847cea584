"""Everything that a run needs before its first step, made from a recipe: data, model, masks, optimiser, schedule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.durations import in_steps
from ..base.metrics import METRICS, Metric
from ..data import DATASETS, Batches, DataSet, open_data
from ..errors import UsageError
from ..kernels import LayerChoice
from ..kernels.convert import use_kernels
from ..kernels.registry import MASKED
from ..mask.saliency import force_masks, scores
from ..models.request import Request, parse_input
from ..models.source import build
from ..optim.optimizers import make_optimizer
from ..optim.schedules import learning_rates
from ..plan.audit import Audit, audit
from ..plan.spec import TrainingSpec, TransformSpec
from ..recipe.load import DTYPES, Recipe, require_data, run_steps, why_masked
from ..recipe.open_arguments import open_arguments
from ..runs.model import load_dense, primary_metric
from ..sparsity.sparsifier import Sparsifier
from ..trace.build import trace
from ..transforms.artifact import is_run
from ..transforms.convert import build_trained, convert
from ..transforms.edits import Masked
from ..transforms.initialise import zero_residuals
from ..transforms.transformation import Options, Transformation
from .compatibility import check_compatibility
from .evaluate import logits_of, loss_of
from .flop_meter import FlopMeter
from .processes import Processes
from .recompute import recompute

if TYPE_CHECKING:
    from ..recipe.schema import Spec

HELD_OUT = 0.1
"""The share of the training split that is held out where a set has nothing else to measure on."""
_DTYPES = {precision: getattr(torch, dtype) for precision, dtype in DTYPES.items() if precision != "fp32"}


@dataclass
class Prepared:
    """A run that is ready to begin (or to be resumed)."""

    recipe: Recipe
    spec: Spec
    seed: int
    steps: int
    dataset: DataSet
    train: Batches
    held_out: Batches
    test: Batches | None
    model: nn.Module
    optimizer: Optimizer
    sparsifier: Sparsifier | None
    rate: Callable[[int], float]
    audit: Audit
    flop_meter: FlopMeter
    transformation: Transformation | None
    request: Request
    """The dense model, with classes and input as the data has them."""
    notes: tuple[str, ...] = ()
    """What the Sparsifier warned of: masks that never move, an optimiser whose steps depend on zeros."""
    kernels: tuple[LayerChoice, ...] = ()
    """Which way computes each transformed weight. Empty: all are masked dense layers."""

    def every(self, duration: float | str) -> int:
        """A duration of the recipe in steps, at least one."""
        return max(
            1,
            in_steps(
                duration, run_steps=self.steps, epoch_steps=self.train.steps_per_epoch, unit=self.spec.training.unit
            ),
        )

    @property
    def primary_metric(self) -> Metric:
        """What says which checkpoint is best: checkpoint.best, else the first of evaluation.metrics."""
        return METRICS.get(primary_metric(self.recipe))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def close(self) -> None:
        """Let go of the data's worker processes."""
        for batches in (self.train, self.held_out, self.test):
            if batches is not None:
                batches.close()

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, where the recipe asks for it."""
        return autocast_of(self.spec, self.device)


def autocast_of(spec: Spec, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision on `device`, where the recipe asks for it."""
    dtype = _DTYPES.get(spec.training.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def prepare(recipe: Recipe, seed: int, processes: Processes) -> Prepared:
    """Open the data, build and transform the model, and put both on the device.

    Raises:
        UsageError: data that is not there, a model that does not fit it, numbers that contradict each other.
        CheckFailed: no density fits the FLOP budget.
    """
    require_data(recipe)
    spec = recipe.spec
    dataset = open_recipe_data(spec)
    train, held_out, test = make_batches(spec, dataset, seed, processes)
    steps = run_steps(spec, train.steps_per_epoch * spec.training.batch_size)
    assert steps is not None
    training = _counting(recipe, steps)
    micro = spec.training.batch_size // (processes.world * spec.training.accumulate)
    fit = partial(
        check_compatibility, name=spec.model.name, dataset=dataset, batch_size=micro, seq=sample_length(spec, dataset)
    )
    model, done, counted = _model(recipe, dataset, train, seed, training, fit)
    if spec.init.zero_residual:
        zero_residuals(model, spec.model.name)
    if spec.training.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model = model.to(processes.device).train()
    fit(model, autocast=partial(autocast_of, spec, processes.device))
    kernels = _use_kernels(spec, model, done, micro) if done else ()
    if training.recompute:
        recompute(model, counted.table, train.batch(0, 0)[0][:1])
    optimizer = make_optimizer(model, spec.optimizer.options(), processes.device)
    with warnings.catch_warnings(record=True, action="always", category=UserWarning) as warned:
        sparsifier = _sparsifier(spec, model, done, optimizer, steps, seed) if done else None
    masked: tuple[Masked, ...] = done.surgery.masked if done else ()
    layers = counted.plan.layers if counted.plan else _dense_rows(counted)
    compact = {choice.name for choice in kernels if choice.backend != MASKED}
    flop_meter = FlopMeter(layers, masked, spec.training.batch_size, recompute=training.recompute, compact=compact)
    in_run = partial(in_steps, run_steps=steps, epoch_steps=train.steps_per_epoch, unit=spec.training.unit)
    rate = learning_rates(spec.schedule.options(), spec.optimizer.lr, steps, in_run)
    return Prepared(
        recipe,
        spec,
        seed,
        steps,
        dataset,
        train,
        held_out,
        test,
        model,
        optimizer,
        sparsifier,
        rate,
        counted,
        flop_meter,
        done,
        request_of(spec, dataset),
        tuple(str(warning.message) for warning in warned),
        kernels,
    )


def _use_kernels(spec: Spec, model: nn.Module, done: Transformation, batch: int) -> tuple[LayerChoice, ...]:
    """Let kernels compute what they can of a forward pass of `batch` samples, as the recipe says."""
    positions = {row.layer.name: row.positions for row in done.plan.layers}
    tokens = {m.key: math.ceil(batch * positions[m.layer]) for m in done.surgery.masked}
    dtype = _DTYPES.get(spec.training.precision)
    choices = use_kernels(model, spec.training.kernels, tokens=tokens, dtype=dtype, masked_because=why_masked(spec))
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()  # what was measured here is no memory of the run
    return choices


def _sparsifier(
    spec: Spec, model: nn.Module, done: Transformation, optimizer: Optimizer, steps: int, seed: int
) -> Sparsifier:
    algorithm = spec.algorithm
    own = algorithm.model_dump(exclude={"name"})
    return Sparsifier(model, done.plan, optimizer, algorithm=algorithm.name, total_steps=steps, seed=seed, **own)


def make_batches(
    spec: Spec, dataset: DataSet, seed: int, processes: Processes
) -> tuple[Batches, Batches, Batches | None]:
    """What is trained on, what is watched, and what is measured once at the end where the recipe says so."""
    training, data = spec.training, spec.data
    assert data is not None
    pieces = processes.world * training.accumulate
    if training.batch_size % pieces:
        raise UsageError(
            f"batch_size {training.batch_size} is not a multiple of {pieces} ({processes.world} processes x "
            f"{training.accumulate} micro-batches)"
        )
    seq = sample_length(spec, dataset)
    shared: dict[str, Any] = {
        "device": processes.device,
        "rank": processes.rank,
        "world": processes.world,
        "seq": seq,
        "workers": data.workers,
        "channels_last": training.channels_last,
    }
    augment: Any = None if data.augment == "none" else "default"
    train = Batches(dataset, "train", training.batch_size, seed, augment=augment, limit=data.limit, **shared)
    size = spec.evaluation.batch_size or training.batch_size
    measured: dict[str, Any] = {"train": False, "limit": spec.evaluation.limit, **shared}
    held_out = Batches(dataset, dataset.held_out, size, seed, **measured)
    return train, held_out, Batches(dataset, _test(dataset), size, seed, **measured) if spec.evaluation.test else None


def open_recipe_data(spec: Spec) -> DataSet:
    """The data of a recipe, with something to watch: a part of the training split where it says so, or where nothing else is.

    A text's end is held out when it is opened.

    Raises:
        UsageError: data that is not there, or cannot be divided as the recipe says.
    """
    assert spec.data is not None
    name, root, options = open_arguments(spec)
    dataset = open_data(name, root, **options)
    source, share = DATASETS.get(name), spec.data.validation
    watched = bool({"valid", "test"} & set(dataset.split_names))
    if "valid_percent" in source.options_of_recipes or (share is None and (watched or not source.can_hold_out)):
        return dataset
    return dataset.with_validation(HELD_OUT if share is None else share)


def _test(dataset: DataSet) -> str:
    """The name of the test split, where training watches another one.

    Raises:
        UsageError: there is none, or it is what evaluations look at during training.
    """
    if "test" not in dataset.split_names or dataset.held_out == "test":
        has = "is watched during training" if dataset.held_out == "test" else "does not exist"
        raise UsageError(
            f"evaluation.test: the test split of {dataset.name} {has}",
            hint="leave it out: the end of a run is measured on the held-out split",
        )
    return "test"


def sample_length(spec: Spec, dataset: DataSet) -> int | None:
    """Tokens in a sample; None of images."""
    if dataset.kind != "tokens":
        return None
    if spec.model.seq is not None:
        return spec.model.seq
    built = build(Request(spec.model.name))
    return built.input_shape[1]


def _counting(recipe: Recipe, steps: int) -> TrainingSpec:
    spec = recipe.spec
    known = {k: v for k, v in recipe.training.items() if k != "steps"}
    if spec.transform is None:
        known["algorithm"] = "dense"
    return TrainingSpec(**known, steps=steps)


def request_of(spec: Spec, dataset: DataSet | None) -> Request:
    """The dense model that a recipe means: classes and input follow the data where the recipe does not say."""
    classes, image = spec.model.num_classes, parse_input(spec.model.input)
    if dataset is not None and dataset.kind == "image" and ":" not in spec.model.name:
        classes, image = classes or dataset.classes, image or tuple(dataset.shape)
    return Request(spec.model.name, classes, image, spec.model.seq)


def _model(
    recipe: Recipe,
    dataset: DataSet,
    train: Batches,
    seed: int,
    training: TrainingSpec,
    fit: Callable[[nn.Module], None],
) -> tuple[nn.Module, Transformation | None, Audit]:
    spec = recipe.spec
    request = request_of(spec, dataset)
    checkpoint = spec.init.checkpoint if spec.init.start == "preserve" else None
    dense = load_dense(checkpoint, trust=True).model if checkpoint and is_run(checkpoint) else None
    checkpoint = None if dense is not None else checkpoint
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.transform is None:
            built, _ = build_trained(request, checkpoint, spec.init.key)
            built = built if dense is None else replace(built, model=dense)
            table = trace(built.model, built.args, built.kwargs, name=built.name, input_shape=built.input_shape).table
            return built.model, None, audit(table, training)
        options = Options(
            start=spec.init.start if "start" in spec.init.model_fields_set else None,
            init=spec.init.weights,
            seed=seed,
            connect=spec.init.connect,
            preserve_slack=spec.init.slack,
            scores=_ranking(spec, train, seed, fit),
        )
        wanted = TransformSpec.of(recipe.transform)
        given: dict[str, Any] = {"checkpoint": checkpoint, "key": spec.init.key, "dense": dense}
        model, done = convert(request, wanted, **given, training=training, options=options)
        return model, done, audit(done.plan, training)


def _ranking(spec: Spec, train: Batches, seed: int, fit: Callable[[nn.Module], None]) -> Any:
    """What Options.scores wants: None, `magnitude`, or a saliency on the first training batch."""
    method = spec.init.masks
    if method in ("random", "magnitude"):
        return None if method == "random" else "magnitude"

    def rank(model: nn.Module, counts: Mapping[str, int]) -> Mapping[str, Tensor]:
        fit(model)  # here is the first loss of all
        x, y = train.batch(0, 0)
        batches = [(x.cpu(), y.cpu())]

        def loss(output: Any, target: Tensor) -> Tensor:
            return loss_of(logits_of(output), target)

        if method == "force":
            masks = force_masks(model, counts, batches, loss, seed=seed)
            return {key: mask.float() for key, mask in masks.items()}
        return scores(model, list(counts), batches, loss, method=method, seed=seed)

    return rank


def _dense_rows(counted: Audit) -> Any:
    from ..plan.audit import rows

    return rows(counted)


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """A copy of `recipe` for one run: `seed` is set and `seeds` is empty."""
    training = recipe.spec.training.model_copy(update={"seed": seed, "seeds": ()})
    return replace(recipe, spec=recipe.spec.model_copy(update={"training": training}))
