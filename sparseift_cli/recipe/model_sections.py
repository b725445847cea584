"""The sections that say what is trained on what: model, data, transform, init, algorithm."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from ..data.registry import CATALOG, find
from ..errors import UsageError, did_you_mean
from ..isoflop import Algorithm
from .section import Count, Part, Section

DATA_NAMES = (*CATALOG, "imagenet")
"""What `data.name` may be; imagenet is an image folder whose size is known."""


def _data_name(name: str) -> str:
    if name.lower() == "imagenet":
        return "imagenet"
    try:
        return find(name)
    except UsageError as error:
        near = did_you_mean(name, DATA_NAMES)
        raise ValueError(f"{error.message}, {near or 'there are ' + ', '.join(DATA_NAMES)}") from None


MemberName = Literal["wide", "parallel", "factorized", "doped",
                     "sparse_wide", "sparse_parallel", "sparse_factorized", "sparse_doped"]  # fmt: skip


class Model(Section):
    """The dense model one starts from."""

    SHORT: ClassVar[str | None] = "name"
    name: str = Field(description="A zoo model, torchvision:NAME, timm:NAME, hf:FOLDER or pkg.module:callable.")
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
    WORDS: ClassVar[tuple[str, ...]] = DATA_NAMES
    name: Annotated[str, AfterValidator(_data_name), WithJsonSchema({"enum": list(DATA_NAMES)})] = Field(
        description="The data set."
    )
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


class Transform(Section):
    """The Sparse-IFT transform: the options of `sparseift flops` and `transform`, under the same names."""

    SHORT: ClassVar[str | None] = "member"
    member: MemberName = Field("wide", description="The member of the family.")
    sparsity: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="s: 0.9 means that nine of ten weights are zero. Also written at the top level of a recipe."
    )
    match: Literal["off", "layer", "model", "train"] = Field(
        "layer",
        description="What is held iso-FLOP: each transformed layer, the model's forward, its training, nothing.",
    )
    scope: Literal["all", "inner", "none"] = Field(
        "all",
        description="wide: every inner width, only widths that no residual stream shares, or none: the layers that all "
        "would widen become sparse at their dense size, a control (match: off).",
    )
    include: tuple[str, ...] = Field((), description="Transform only layers that match one of these globs.")
    exclude: tuple[str, ...] = Field((), description="Leave layers that match one of these globs as they are.")
    width_multiple: Count = Field(1, description="wide: round widths to this multiple.")
    base_width: Count | None = Field(
        None, description="wide: new width of the stem; every other width keeps its proportion to it."
    )
    heads: Literal["scale_dim", "scale_count"] = Field(
        "scale_dim", description="wide: attention grows by larger heads, or by more of them."
    )
    depthwise: Literal["dense", "sparse"] = Field("dense", description="wide: what depthwise convolutions become.")
    branch_activation: Literal["each", "sum"] = Field(
        "each", description="parallel: norm and activation in each branch, or after their sum."
    )
    inner: Literal["activation", "norm", "linear"] = Field(
        "activation", description="factorized: what stands between U and V."
    )
    norm: Literal["model", "batch_norm", "none"] = Field("model", description="Norm inside a member.")
    activation: str = Field(
        "model",
        description="Activation inside a member: the model's (parallel: behind a norm, that of the layer itself), none, or one "
        "of torch.nn.functional.",
    )
    projections: Literal["untouched", "transformed"] = Field(
        "untouched", description="Attention projections under parallel, factorized and doped."
    )
    pattern: str = Field(
        "unstructured",
        pattern=r"^(unstructured|\d+:\d+|\d+x\d+)$",
        description="unstructured, N:M (2:4) or blocks (4x4).",
    )
    distribution: Literal["uniform", "er", "erk"] = Field(
        "uniform", description="How non-zeros are spread over layers; er and erk need match: model or train."
    )


class Init(Section):
    """Weights and masks at step 0."""

    SHORT: ClassVar[str | None] = "start"
    start: Literal["fresh", "preserve"] = Field(
        "fresh",
        description="fresh: drawn anew. preserve: the function of a dense checkpoint; with scope none its largest weights.",
    )
    checkpoint: str | None = Field(None, description="preserve: the dense checkpoint, a file or folder.")
    key: str | None = Field(None, description="preserve: dotted path of the state dict in the checkpoint.")
    weights: Literal["dense", "density_scaled"] = Field(
        "dense", description="fresh: deviations from the dense fan, or from fan times density."
    )
    masks: Literal["random", "magnitude", "snip", "grasp", "force"] = Field(
        "random", description="fresh: which weights are kept; snip, grasp and force look at training batches."
    )
    slack: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="preserve: this part of the weights, the smallest, goes to new channels."
    )
    connect: bool = Field(True, description="Give every output a non-zero where the count allows.")
    zero_residual: bool = Field(
        False, description="fresh: the residual branches of a ResNet begin at zero, by the scale of their last norm."
    )


class MaskAlgorithm(Section):
    """How masks change while it trains."""

    SHORT: ClassVar[str | None] = "name"
    name: Algorithm = Field(
        "static", description="dense, static, set, rigl, gmp, granet (snfs is counted, not trained)."
    )
    delta_t: Count = Field(100, description="Optimiser steps between two mask updates.")
    drop_fraction: Part = Field(0.3, description="Part of the active weights that the first update exchanges.")
    decay: Literal["cosine", "constant", "linear", "inverse_power"] = Field(
        "cosine", description="How the drop fraction falls until `stop`."
    )
    stop: Part = Field(0.75, description="Part of the run after which masks stay as they are.")
    regrow: Literal["allow", "forbid"] = Field(
        "allow", description="Whether a weight may return in the update that dropped it."
    )
