"""What the sections of a recipe share: frozen, strict models whose fields say in a sentence what they mean."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import MISSING, dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function, str_schema

from ..base.metrics import METRICS
from ..base.options import DeclaredOption, options_of
from ..base.registry import Registry
from ..data import DATASETS
from ..errors import UsageError
from ..models.request import proper_source
from ..plan.spec import InitSpec, TrainingSpec, TransformSpec
from ..sparsity.algorithms import ALGORITHMS, SHIPPED
from . import durations


class Section(BaseModel):
    """One section. `SHORT` is the field that a single word stands for: `optimizer: sgd` is `optimizer: {name: sgd}`.

    `WORDS` lists what this word may be, where the field's type does not; `package.module:Name` is a word too then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    SHORT: ClassVar[str | None] = None
    WORDS: ClassVar[Registry[Any] | None] = None


S = TypeVar("S", bound=Section)

Duration = Annotated[
    float | str,
    PlainValidator(durations.check),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": durations.PATTERN}]}),
]
"""A number in the unit of the run's length, or text: `500 steps`, `2 epochs`, `10%`."""

Count = Annotated[int, Field(ge=1)]
Part = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class _NameIn:
    """A field's type: a name of a registry, or `package.module:Name`; any spelling the registry reads, listed when asked."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._checked, str_schema())

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return names_or_object(self.registry)

    def _checked(self, name: str) -> str:
        try:
            self.registry.get(name)
        except UsageError as error:
            raise ValueError(f"{error.message} ({error.hint})" if error.hint else error.message) from None
        return self.registry.canonical(name)


def names_or_object(names: Iterable[str]) -> dict[str, Any]:
    """JSON schema of a name that a registry lists, or `package.module:Name`."""
    return {"anyOf": [{"enum": list(names)}, {"type": "string", "pattern": r"^[\w.]+:[\w.]+$"}]}


def section_of(
    declaring: type,
    *,
    required: Collection[str] = (),
    without: Collection[str] = (),
    name: str | None = None,
    base: type[S] = Section,
) -> type[S]:
    """A base class for a section: a field for each option that the dataclass `declaring` declares.

    Args:
        declaring: a dataclass whose fields have an `Option`.
        required: options that a recipe must give although the dataclass has a default.
        without: options that recipes write elsewhere, or not at all.
        name: makes the section one of several that a key `name` chooses between, and this is its word.
        base: what the section inherits from.
    """
    fields: dict[str, Any] = {}
    if name is not None:
        fields["name"] = (Literal[name], Field(name, description="The name."))
    for declared in options_of(declaring).values():
        if declared.name not in without:
            fields[declared.name] = field_of(declared, required=declared.name in required)
    return create_model(declaring.__name__, __base__=base, __module__=__name__, **fields)


def field_of(declared: DeclaredOption, *, required: bool = False) -> tuple[Any, Any]:
    """Type and default of the field of a section that a declared option means."""
    option = declared.option
    kind: Any = declared.type
    if isinstance(option.names, Registry):
        kind = Annotated[str, _NameIn(option.names)]
    elif option.names is not None:
        kind = Literal[declared.choices]
    elif option.decimal:
        kind = float
    if declared.optional:
        kind = kind | None
    default = declared.default
    if required or default is MISSING:
        default = ...
    elif option.decimal:
        default = float(default)
    bounds = {"ge": option.minimum, "gt": option.above, "le": option.maximum, "lt": option.below}
    limits: dict[str, Any] = {word: limit for word, limit in bounds.items() if limit is not None}
    return kind, Field(default, description=declared.help, pattern=option.pattern, **limits)


def option(declaring: type, name: str) -> Any:
    """Default, bounds and description of one declared option, for the field of a section that has other fields too."""
    return field_of(options_of(declaring)[name])[1]


# The sections that say what is trained on what: model, data, transform, init, algorithm.


MemberName = Literal[
    "wide", "parallel", "factorized", "doped", "sparse_wide", "sparse_parallel", "sparse_factorized", "sparse_doped"
]


class Model(Section):
    """The dense model one starts from."""

    SHORT: ClassVar[str | None] = "name"
    name: Annotated[str, AfterValidator(proper_source)] = Field(
        description="A zoo model, torchvision:NAME, timm:NAME, hf:FOLDER or pkg.module:callable."
    )
    num_classes: Count | None = Field(None, description="Classes of an image model. Default: those of the data.")
    input: str | None = Field(
        None,
        pattern=r"^[1-9]\d*(x[1-9]\d*)*$",
        description="One sample's shape, as 3x224x224. Default: the model's own; of a zoo model that of the data.",
    )
    seq: Count | None = Field(None, description="Tokens in a sample of a language model. Default: the model's own.")


class Data(Section):
    """What it learns from."""

    SHORT: ClassVar[str | None] = "name"
    WORDS: ClassVar[Registry[Any] | None] = DATASETS
    name: Annotated[str, _NameIn(DATASETS)] = Field(description="The data set: one of these, or package.module:Name.")
    root: str | None = Field(
        None, description="Folder or file of the data. Default: $SPARSEIFT_DATA, else ~/.cache/sparseift."
    )
    download: bool = Field(True, description="CIFAR, MNIST: fetch it, checksums checked, where it is not there.")
    augment: Literal["default", "none"] = Field(
        "default", description="Of training images: what the set names (CIFAR: crop and flip), or nothing."
    )
    limit: Count | None = Field(
        None, description="Use the first N training samples only (images, or windows of model.seq tokens)."
    )
    level: Literal["bytes", "words"] = Field("bytes", description="Text by bytes or by words.")
    max_vocab: Count | None = Field(
        None, description="words: keep the N most frequent. Default: all of the training text."
    )
    validation: Annotated[float, Field(ge=0.01, le=0.99)] | None = Field(
        None,
        description="Held out to watch: of CIFAR, MNIST or digits a part of the training images, drawn once (then "
        "evaluation.test is for the test split); of text in a single file its end, 0.1 unless told.",
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="Image folders: processes that decode; 0: the main one."
    )


class Transform(section_of(TransformSpec, required=("sparsity",))):
    """The Sparse-IFT transform: the options of `sparseift flops` and `transform`, under the same names."""

    SHORT: ClassVar[str | None] = "member"
    member: MemberName = Field("wide", description="The member of the family.")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Init(section_of(InitSpec)):
    """Weights and masks at step 0."""

    SHORT: ClassVar[str | None] = "start"

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class AlgorithmSection(Section):
    """How masks change: the name of a mask algorithm, and its own options."""

    SHORT: ClassVar[str | None] = "name"
    name: str = Field(description="The mask algorithm.")


@cache
def algorithm_section(name: str) -> type[AlgorithmSection]:
    """The section `algorithm` for one mask algorithm: its name, and the options that it declares.

    Args:
        name: as in `ALGORITHMS`, or `package.module:Name`.

    Raises:
        UsageError: no such algorithm.
    """
    algorithm = ALGORITHMS.get(name)
    section = section_of(algorithm, name=name, base=AlgorithmSection)
    section.__doc__ = algorithm.summary()
    return section


ALGORITHM_SECTIONS = tuple(algorithm_section(name) for name in SHIPPED)
"""One for each algorithm of this package; those of others are made when a recipe names them."""


# The sections that say how it is trained: optimizer, schedule, training, evaluation, checkpoint.

NoDecay = tuple[Literal["norm", "bias"], ...]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


MetricName = Annotated[str, _NameIn(METRICS)]

_NO_DECAY = "Parameters without weight decay: norm, bias."
_WEIGHT_DECAY = "Weight decay."
_LR = "Learning rate at its peak."
_FUSED = "One kernel for the whole update, where the device has it."


class SGD(Section):
    """Stochastic gradient descent."""

    SHORT: ClassVar[str | None] = "name"
    name: Literal["sgd"] = Field("sgd", description="The optimiser.")
    lr: Positive = Field(0.1, description=_LR)
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Momentum.")
    nesterov: bool = Field(False, description="Nesterov's form of momentum.")
    weight_decay: NotNegative = Field(0.0, description=_WEIGHT_DECAY)
    no_decay_on: NoDecay = Field((), description=_NO_DECAY)
    fused: bool = Field(True, description=_FUSED)

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGD:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class AdamW(Section):
    """Adam with decoupled weight decay."""

    SHORT: ClassVar[str | None] = "name"
    name: Literal["adamw"] = Field("adamw", description="The optimiser.")
    lr: Positive = Field(1e-3, description=_LR)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="Decay of the means of gradients and of their squares."
    )
    eps: Positive = Field(1e-8, description="Added to the root of the mean square.")
    weight_decay: NotNegative = Field(0.01, description=_WEIGHT_DECAY)
    no_decay_on: NoDecay = Field((), description=_NO_DECAY)
    fused: bool = Field(True, description=_FUSED)


class _Schedule(Section):
    SHORT: ClassVar[str | None] = "name"
    warmup: Duration = Field(0.0, description="The learning rate rises linearly from 0 over this time.")


class Constant(_Schedule):
    """The peak, from the end of the warm-up on."""

    name: Literal["constant"] = Field("constant", description="The schedule of the learning rate.")


class MultiStep(_Schedule):
    """The peak times gamma at each milestone."""

    name: Literal["multistep"] = Field("multistep", description="The schedule of the learning rate.")
    milestones: tuple[Duration, ...] = Field(("30%", "60%", "80%"), description="When the learning rate drops.")
    gamma: Positive = Field(0.1, description="What each milestone multiplies it by.")


class Cosine(_Schedule):
    """Half a cosine from the peak to `final_lr`, from the end of the warm-up to the end of the run."""

    name: Literal["cosine"] = Field("cosine", description="The schedule of the learning rate.")
    final_lr: NotNegative = Field(0.0, description="Learning rate at the end.")


class Linear(_Schedule):
    """A straight line from the peak to `final_lr`, from the end of the warm-up to the end of the run."""

    name: Literal["linear"] = Field("linear", description="The schedule of the learning rate.")
    final_lr: NotNegative = Field(0.0, description="Learning rate at the end.")


class Training(Section):
    """The run itself."""

    epochs: Positive | None = Field(None, description="Length of the run in passes over the training data.")
    steps: Count | None = Field(None, description="Length of the run in optimiser steps, instead of epochs.")
    batch_size: Count = Field(
        128, description="Samples of a step, over all micro-batches and processes; epochs leave out a smaller last one."
    )
    accumulate: Count = Field(1, description="Micro-batches that a process adds up to a step.")
    clip: Positive | None = Field(None, description="Largest norm of the gradient; larger ones are scaled to it.")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Label smoothing.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Autocast forward and backward to this type."
    )
    channels_last: bool = Field(False, description="Images in channels-last memory.")
    compile: bool | Literal["auto"] = Field(
        False, description="torch.compile the model and the augmentation; auto: on a GPU only."
    )
    cuda_graph: bool = Field(
        True, description="On a GPU, replay the whole step as a CUDA graph, where that can be (not fp16, one process)."
    )
    recompute: bool = option(TrainingSpec, "recompute")
    deterministic: bool = Field(
        False, description="Deterministic kernels: on a GPU, resuming is exact to the bit only with these; slower."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")
    threads: Count | None = Field(None, description="CPU threads; bits depend on it. Default: PyTorch's choice.")
    seed: Seed = Field(0, description="Of weights, masks, data order and augmentation.")
    seeds: tuple[Seed, ...] = Field(
        (), description="One run for each of these, instead of `seed`. --seeds 0..4 sets it."
    )

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("the length of the run is epochs or steps: give one of them")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.accumulate} micro-batches")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds has a seed twice")
        return self

    @property
    def unit(self) -> Literal["epochs", "steps"]:
        """What a plain number as a duration counts."""
        return "steps" if self.epochs is None else "epochs"


class Evaluation(Section):
    """What is measured on held-out data, and when."""

    every: Duration = Field("1 epoch", description="Time between two evaluations; the end of the run has one always.")
    metrics: tuple[MetricName, ...] = Field(("loss",), description="What is measured.")
    limit: Count | None = Field(
        None, description="Use the first N held-out samples only (images, or windows of model.seq tokens)."
    )
    batch_size: Count | None = Field(None, description="Samples of a batch. Default: that of the training.")
    test: bool = Field(False, description="Measure the test split too, once, at the end: where another one is watched.")


class CheckpointSettings(Section):
    """What a run leaves on disk to resume from."""

    every: Duration = Field("5%", description="Time between two checkpoints; the end of the run has one always.")
    keep: Count = Field(2, description="The newest N are kept, beside the best.")
    best: MetricName | None = Field(
        None, description="The metric that says which one is best (loss, perplexity: lowest)."
    )
