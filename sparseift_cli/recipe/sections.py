"""What the sections of a recipe share: frozen, strict models whose fields say in a sentence what they mean."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import MISSING, dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WrapValidator,
    create_model,
    model_validator,
)

from ..base.durations import Duration
from ..base.metrics import METRICS
from ..base.options import DeclaredOption, options_of
from ..base.registry import Registry
from ..data import DATASETS
from ..errors import UsageError
from ..kernels.registry import AUTO, KERNELS, MASKED, canonical
from ..models.request import proper_source
from ..optim import optimizers, schedules
from ..optim.optimizers import OPTIMIZERS
from ..optim.schedules import SCHEDULES
from ..plan.distributions import PerLayer
from ..plan.spec import InitSpec, TrainingSpec, TransformSpec
from ..sparsity.algorithms import ALGORITHMS, SHIPPED


class Section(BaseModel):
    """One section. `SHORT` is the field that a single word sets: `optimizer: sgd` is `optimizer: {name: sgd}`.

    `DECLARING` is the dataclass whose options the fields are, where there is one.
    `WORDS` lists what this word may be, where the field's type does not; `package.module:Name` is a word too then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    SHORT: ClassVar[str | None] = None
    WORDS: ClassVar[Registry[Any] | None] = None
    DECLARING: ClassVar[type | None] = None

    def options(self) -> Any:
        """The dataclass that the section was made from, with the values of the section.

        Raises:
            UsageError: they contradict each other.
        """
        assert self.DECLARING is not None
        return self.DECLARING(**{key: getattr(self, key) for key in type(self).model_fields if key != "name"})

    @model_validator(mode="after")
    def _options_agree(self) -> Section:
        if self.DECLARING is not None:
            try:
                self.options()
            except UsageError as error:
                raise ValueError(error.message) from None
        return self


S = TypeVar("S", bound=Section)

Count = Annotated[int, Field(ge=1)]
Part = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class _NameIn:
    """A field's type: a name of a registry, or `package.module:Name`; any spelling the registry reads, listed when asked."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return AfterValidator(self._checked).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return names_or_object(self.registry)

    def _checked(self, value: Any) -> Any:
        try:
            self.registry.get(value)
        except UsageError as error:
            raise ValueError(f"{error.message} ({error.hint})" if error.hint else error.message) from None
        return self.registry.canonical(value)


OBJECT_PATTERN = r"^[\w.]+:[\w.]+$"
"""`package.module:Name`."""


@dataclass(frozen=True, slots=True)
class _NameOrByLayer(_NameIn):
    """A field's type: a name as `_NameIn` has it, or a mapping from globs over layer names to sparsities."""

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        sparsity = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
        mapping = {"type": "object", "additionalProperties": sparsity, "minProperties": 1}
        return {"anyOf": [*names_or_object(self.registry)["anyOf"], mapping]}

    def _checked(self, value: Any) -> Any:
        if isinstance(value, str):
            return _NameIn._checked(self, value)
        if not isinstance(value, dict):
            raise ValueError(f"expected a name or a mapping from globs over layer names to sparsities, not {value!r}")
        try:
            PerLayer.of(value)
        except UsageError as error:
            raise ValueError(error.message) from None
        return value


@dataclass(frozen=True, slots=True)
class _Kernels(_NameIn):
    """A field's type: a kernel backend as `_NameIn` has it, or one of the words that `select` knows beside them."""

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return names_or_object((AUTO, MASKED, *self.registry))

    def _checked(self, value: Any) -> Any:
        return canonical(_read_by(canonical)(value))


def names_or_object(names: Iterable[str]) -> dict[str, Any]:
    """JSON schema of a name that a registry lists, or `package.module:Name`."""
    return {"anyOf": [{"enum": list(names)}, {"type": "string", "pattern": OBJECT_PATTERN}]}


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
        fields["name"] = (Literal[name], Field(name, description="Its name."))
    for declared in options_of(declaring).values():
        if declared.name not in without:
            fields[declared.name] = field_of(declared, required=declared.name in required)
    return create_model(declaring.__name__, __base__=base, __module__=__name__, **fields)


def field_of(declared: DeclaredOption, *, required: bool = False) -> tuple[Any, Any]:
    """Type and default of the field of a section that a declared option means."""
    option = declared.option
    kind: Any = declared.type
    if isinstance(option.names, Registry) and option.by_layer:
        kind = Annotated[Any, _NameOrByLayer(option.names)]
    elif isinstance(option.names, Registry):
        kind = Annotated[str, _NameIn(option.names)]
    elif option.reads is not None:
        kind = Annotated[str, AfterValidator(_read_by(option.reads))]
    elif option.names is not None:
        kind = Literal[declared.choices]
    elif option.decimal:
        kind = float
    if declared.notes:
        kind = Annotated[(kind, *declared.notes)]
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


def _read_by(reads: Callable[[str], object]) -> Callable[[str], str]:
    """A check of a text by what reads it; pydantic reports ValueErrors."""

    def checked(text: str) -> str:
        try:
            reads(text)
        except UsageError as error:
            raise ValueError(f"{error.message} ({error.hint})" if error.hint else error.message) from None
        return text

    return checked


def option(declaring: type, name: str) -> Any:
    """Default, bounds and description of one declared option, for the field of a section that has other fields too."""
    return field_of(options_of(declaring)[name])[1]


# The sections that say what is trained on what: model, data, transform, init, algorithm.


class Model(Section):
    """The dense model one starts from."""

    SHORT: ClassVar[str | None] = "name"
    name: Annotated[str, AfterValidator(proper_source)] = Field(
        description="A zoo model, torchvision:NAME, timm:NAME, hf:FOLDER or pkg.module:callable; with `init` also a checkpoint "
        "of a zoo model, or a run that trained a dense one."
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
    level: Literal["bytes", "words", "bpe"] = Field(
        "bytes", description="Text by bytes, words or subwords (byte-level BPE)."
    )
    max_vocab: Count | None = Field(
        None,
        description="words: keep the N most frequent. Default: all of the training text. bpe: train a vocabulary of N on the "
        "training text. Default: 50,257.",
    )
    tokenizer: str | None = Field(
        None, description="bpe: the tokenizer.json of a vocabulary. Default: one is trained on the training text."
    )
    validation: Annotated[float, Field(ge=0.01, le=0.99)] | None = Field(
        None,
        description="Held out to watch: a part of the training images, drawn once (then evaluation.test is for the test "
        "split); of text and tokens the end of the training part. 0.1 where no files say what is held out.",
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="Image folders: processes that decode; 0: the main one."
    )


class Transform(section_of(TransformSpec, required=("sparsity",))):
    """The Sparse-IFT transform: the options of `sparseift flops` and `transform`, under the same names."""

    SHORT: ClassVar[str | None] = "member"

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

Seed = Annotated[int, Field(ge=0, lt=2**63)]


MetricName = Annotated[str, _NameIn(METRICS)]


def chosen_section(registry: Registry[Any], name: str) -> type[Section]:
    """The section of one entry of a registry of options classes, whose key `name` says `name`."""
    return _chosen_section(registry.get(name), name)


@cache
def _chosen_section(declaring: type, name: str) -> type[Section]:
    made = section_of(declaring, name=name)
    made.SHORT = "name"
    made.DECLARING = declaring
    made.__doc__ = declaring.__doc__
    return made


@dataclass(frozen=True, slots=True)
class _OneOf:
    """A field's type: a section of one of the shipped entries of a registry; of any other that it has, made when it is named."""

    registry: Registry[Any]
    shipped: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return WrapValidator(self._validate).__get_pydantic_core_schema__(source, handler)

    def _validate(self, given: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(given, dict):  # from JSON, whose lists strict tuples refuse once a function has seen them
            given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        name = given.get("name") if isinstance(given, dict) else None
        if not isinstance(name, str) or name in self.shipped or not (":" in name or name in self.registry):
            return handler(given)
        try:
            section = chosen_section(self.registry, name)
        except UsageError as error:
            raise ValueError(f"{error.message} ({error.hint})" if error.hint else error.message) from None
        return section.model_validate(given)


def _sections_of(registry: Registry[Any], shipped: Collection[str]) -> Any:
    """The type of a section that chooses one entry of a registry by its name."""
    union = Union[tuple(chosen_section(registry, name) for name in shipped)]  # noqa: UP007  # made from a tuple
    return Annotated[union, Field(discriminator="name"), _OneOf(registry, shipped)]


Optimizer = _sections_of(OPTIMIZERS, optimizers.SHIPPED)
Schedule = _sections_of(SCHEDULES, schedules.SHIPPED)
REGISTRIES: dict[str, Registry[Any]] = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}
"""Sections that choose one entry of a registry by its name; each entry has options of its own."""


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
    kernels: Annotated[str, _Kernels(KERNELS)] = Field(
        AUTO,
        description="Which kernels compute layers with masks of square blocks: auto takes for each layer the fastest on the "
        "device; masked multiplies by the zeros; or a backend. FLOPs that are counted stay the same.",
    )
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
        None, description="The metric that says which one is best (loss, perplexities: lowest)."
    )
