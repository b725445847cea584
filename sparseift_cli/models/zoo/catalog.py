"""What the zoo holds: one `ModelInfo` per model, readable without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ...base.registry import Registry
from ...errors import UsageError

if TYPE_CHECKING:
    from torch import nn

Image = tuple[int, int, int]
"""Channels, height and width in pixels."""


@dataclass(frozen=True)
class ModelInfo:
    """One model by name: what is known of it without building it, and where it is built.

    A model from outside brings `make`, which is called with `num_classes` and `image` (image models) or with nothing
    (language models) and returns the module:

        MODELS.register("my_net", ModelInfo("my_net", make=my_net, image=(3, 32, 32), num_classes=10))
    """

    name: str
    family: str = ""
    """The module of this package that defines it; empty where `make` builds it."""
    title: str = ""
    """One line for people."""
    source: str = ""
    """Paper, and whose `state_dict` keys the model has."""
    image: Image | None = None
    """Default input of an image model; None for a language model."""
    num_classes: int | None = None
    """Default outputs of the classifier; None for a language model."""
    seq: int | None = None
    """Default tokens per sequence of a language model; None for an image model."""
    max_seq: int | None = None
    """Tokens that fit the table of learned positions; None where there is no table."""
    make: Callable[..., nn.Module] | None = None
    """Builds a model from outside the zoo."""

    @property
    def kind(self) -> Literal["image", "tokens"]:
        """What the model reads."""
        return "tokens" if self.image is None else "image"

    def with_input(
        self, *, num_classes: int | None = None, seq: int | None = None, image: Image | None = None
    ) -> ModelInfo:
        """This model with other classes or another input size; what is None stays.

        Raises UsageError for an option that this kind of model does not have, and for sizes it cannot take.
        """
        if self.kind == "tokens":
            refuse(self, "--num-classes", num_classes, "language models have no classifier")
            refuse(self, "--input", image, "it reads tokens: give their number with --seq")
        else:
            refuse(self, "--seq", seq, "it reads images: give their size with --input, as 3x224x224")
        for option, value in (("--num-classes", num_classes), ("--seq", seq)):
            if value is not None and value < 1:
                raise UsageError(f"{option} {value}: must be at least 1")
        if image is not None and min(image) < 1:
            raise UsageError(f"--input {'x'.join(map(str, image))}: every side must be at least 1")
        if seq is not None and self.max_seq is not None and seq > self.max_seq:
            raise UsageError(
                f"--seq {seq}: {self.name} has learned positions for at most {self.max_seq} tokens",
                hint=f"give --seq {self.max_seq} or less",
            )
        return replace(
            self, num_classes=num_classes or self.num_classes, seq=seq or self.seq, image=image or self.image
        )

    def input_shape(self, batch: int = 1) -> tuple[int, ...]:
        """[batch, channels, height, width] of an image batch, [batch, tokens] of a batch of sequences."""
        if batch < 1:
            raise UsageError(f"--batch {batch}: must be at least 1")
        return (batch, *self.image) if self.image is not None else (batch, self.seq or 1)


def refuse(info: ModelInfo, option: str, value: object, reason: str) -> None:
    """Raise UsageError where `option` was given to a model that has no use for it."""
    if value is not None:
        raise UsageError(f"{option} does not apply to {info.name}", hint=reason)


IMAGENET: Image = (3, 224, 224)
CIFAR: Image = (3, 32, 32)

RESNET = "He et al. 2015, arXiv 1512.03385"
TORCHVISION = "keys of torchvision"
TRANSFORMERS = "keys of Hugging Face transformers"


def _resnet(depth: int) -> ModelInfo:
    title = f"ResNet-{depth} for ImageNet"
    return ModelInfo(f"resnet{depth}", "resnet", title, f"{RESNET}; {TORCHVISION}", IMAGENET, 1000)


def _resnet_for_cifar(depth: int) -> ModelInfo:
    title = f"ResNet-{depth} with a 3x3 stem for CIFAR-100"
    return ModelInfo(f"resnet{depth}_cifar", "resnet", title, f"{RESNET}; {TORCHVISION}", CIFAR, 100)


def _cifar_resnet(depth: int) -> ModelInfo:
    source = f"{RESNET}, section 4.2; keys of akamaster/pytorch_resnet_cifar10"
    return ModelInfo(f"resnet{depth}", "resnet_cifar", f"CIFAR-10 ResNet-{depth}, three stages", source, CIFAR, 10)


def _wide_resnet(depth: int, factor: int) -> ModelInfo:
    source = "Zagoruyko & Komodakis 2016, arXiv 1605.07146; keys of xternalz/WideResNet-pytorch"
    title = f"Wide ResNet WRN-{depth}-{factor} for CIFAR-100"
    return ModelInfo(f"wrn{depth}_{factor}", "wide_resnet", title, source, CIFAR, 100)


def _vit(size: str, paper: str) -> ModelInfo:
    title = f"Vision Transformer ViT-{size.upper()}/16"
    return ModelInfo(f"vit_{size}_16", "vit", title, f"{paper}; {TORCHVISION}", IMAGENET, 1000)


def _bert(size: str) -> ModelInfo:
    source = f"Devlin et al. 2018, arXiv 1810.04805; {TRANSFORMERS} (BertModel)"
    return ModelInfo(f"bert_{size}", "bert", f"BERT-{size}, encoder with pooler", source, seq=512, max_seq=512)


def _gpt2(name: str, parameters: str) -> ModelInfo:
    source = f"Radford et al. 2019; {TRANSFORMERS} (GPT2LMHeadModel)"
    return ModelInfo(name, "gpt", f"GPT-2 of {parameters} parameters, tied head", source, seq=1024, max_seq=1024)


def _gpt3(size: str) -> ModelInfo:
    source = f"Brown et al. 2020, arXiv 2005.14165, table 2.1; {TRANSFORMERS} (GPT2LMHeadModel)"
    name = f"gpt3_{size.lower().replace('.', '_')}"
    return ModelInfo(name, "gpt", f"GPT-3 {size}, dense attention, tied head", source, seq=2048, max_seq=2048)


LLAMA = f"Llama 3: arXiv 2407.21783; {TRANSFORMERS} (LlamaForCausalLM)"

QUICKSTART = "for the quickstart recipes of sparseift"
BYTES = "the sizes of Brown et al. 2020, arXiv 2005.14165, table 2.1; bytes need no tokeniser"
OF_NO_LIBRARY = (QUICKSTART, BYTES)
"""Sources of models whose state dicts have the names of no other library."""

_ZOO = {
    info.name: info
    for info in (
        *map(_resnet, (18, 34, 50, 101, 152)),
        *map(_resnet_for_cifar, (18, 34)),
        *map(_cifar_resnet, (20, 32, 44, 56)),
        _wide_resnet(22, 2),
        _wide_resnet(28, 10),
        ModelInfo(
            "mobilenet_v2",
            "mobilenet",
            "MobileNetV2 at width 1.0",
            f"Sandler et al. 2018, arXiv 1801.04381; {TORCHVISION}",
            IMAGENET,
            1000,
        ),
        _vit("s", "Touvron et al. 2020, arXiv 2012.12877"),
        _vit("b", "Dosovitskiy et al. 2020, arXiv 2010.11929"),
        ModelInfo(
            "botnet50",
            "botnet",
            "BoTNet-50: ResNet-50 with attention in its last stage",
            f"Srinivas et al. 2021, arXiv 2101.11605; {TORCHVISION}'s ResNet-50, attention named as timm's",
            IMAGENET,
            1000,
        ),
        ModelInfo(
            "mobilevit_s",
            "mobilevit",
            "MobileViT-S (the paper's input is 3x256x256)",
            "Mehta & Rastegari 2021, arXiv 2110.02178; keys of timm",
            IMAGENET,
            1000,
        ),
        _bert("base"),
        _bert("large"),
        _gpt2("gpt2", "124 M"),
        _gpt2("gpt2_medium", "355 M"),
        _gpt2("gpt2_large", "774 M"),
        _gpt2("gpt2_xl", "1.56 B"),
        *map(_gpt3, ("Small", "Medium", "Large", "XL", "2.7B", "6.7B", "13B", "175B")),
        ModelInfo("llama_tiny", "llama", "Llama-style decoder of 11 M parameters, GQA, tied head", LLAMA, seq=256),
        ModelInfo("llama3_8b", "llama", "Llama 3 8B, GQA, trained on 8192 tokens", LLAMA, seq=4096),
        ModelInfo("digits_mlp", "digits", "Seven linear layers for 8x8 digits", QUICKSTART, (1, 8, 8), 10),
        ModelInfo("digits_cnn", "digits", "Four convolutions for 8x8 digits", QUICKSTART, (1, 8, 8), 10),
        ModelInfo("bytes_gpt", "gpt", "GPT over bytes: 4 blocks of width 64", QUICKSTART, seq=128, max_seq=128),
        ModelInfo("wikitext_gpt", "gpt", "GPT over bytes: 6 blocks of width 256", QUICKSTART, seq=256, max_seq=256),
        ModelInfo("gpt3_small_bytes", "gpt", "GPT-3 Small over bytes, without dropout", BYTES, seq=1024, max_seq=1024),
    )
}

ALIASES = {
    "resnet18_cifar100": "resnet18_cifar",
    "resnet34_cifar100": "resnet34_cifar",
    "wide_resnet22_2": "wrn22_2",
    "wide_resnet28_10": "wrn28_10",
    "botnet": "botnet50",
    "bot50": "botnet50",
    "mobilevit": "mobilevit_s",
    "vit_small_patch16_224": "vit_s_16",
    "vit_base_patch16_224": "vit_b_16",
    "bert_base_uncased": "bert_base",
    "bert_large_uncased": "bert_large",
    "gpt2_small": "gpt2",
    "gpt3": "gpt3_175b",
    "meta_llama_3_8b": "llama3_8b",
}
"""Names that other places use. Case, dashes, dots and underscores never matter and need no entry."""


def _not_a_model(entry: object) -> str | None:
    if not isinstance(entry, ModelInfo):
        return f"it is a {type(entry).__name__}, not a ModelInfo"
    if not entry.family and entry.make is None:
        return "it has no `make` that builds it"
    if (entry.image is None) == (entry.seq is None):
        return "it needs `image`, one sample's (channels, height, width), or `seq`, tokens in a sample: one of them"
    return None


MODELS: Registry[ModelInfo] = Registry("model", "models", _ZOO, aliases=ALIASES, check=_not_a_model)
"""Every model by name, those of installed packages (entry points `sparseift.models`) included."""
